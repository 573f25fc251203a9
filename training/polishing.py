"""Owns the fourth phase of the training: the model reads its own text again, behind whole lines, for blemishes of all kinds.

The third phase made long repetitions rare. What was left in greedy text: words put together wrongly, short loops, and ends
in the middle of a document, where only a conversation may end.
"""

from collections.abc import Iterable
from dataclasses import replace

from tokenizers import Tokenizer
from torch import Tensor

from training.blemishes import Spelling
from training.own_text import Correction, PromptText
from training.readability import library_words
from training.settling import SETTLING
from training.tokenizer import SPECIAL_TOKENS
from training.windows import Stage

LINE_BREAK = "Ċ"  # as a byte-level vocabulary writes it

RECIPE = replace(SETTLING, seed=2028)
POLISHING = Correction(
    rounds=50,
    prompt_tokens=(8, 16, 32),
    windows=Stage(1, 12, 256),
    peak_rate=0.3,
    barred=len(SPECIAL_TOKENS),
    kept=0.6,  # with the whole of it the text is spelt better, but ends and loops in other places
)


def spelling(tokenizer: Tokenizer, texts: Iterable[str]) -> Spelling:
    """Return the spelling whose words are those of the texts."""
    return Spelling(_pieces(tokenizer), library_words(texts))


def whole_lines(tokenizer: Tokenizer, tokens: Tensor) -> PromptText:
    """Return a stream of tokens as text whose prompts end with a line."""
    breaks = [LINE_BREAK in piece for piece in _pieces(tokenizer)]
    return PromptText(tokens, [place for place, token in enumerate(tokens.tolist(), start=1) if breaks[token]])


def _pieces(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(str(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size()))
