"""The recipe of the small model that ships with the repository: corpus, tokenizer, network, optimiser, export."""
