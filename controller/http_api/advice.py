"""Owns what a client is told that asks for an endpoint which is not served. Pure."""

from __future__ import annotations

_GENERATE = "Use /v1/chat/completions or /v1/completions."

_NOT_SERVED = {
    "/v1/embeddings": "Embeddings are not served: pdserve generates text. Run an embedding server, and point the client there.",
    "/v1/moderations": "Moderation is not served. Run a classifier beside pdserve, and point the client there.",
    "/v1/audio": "Audio is not served: pdserve generates text. Run a speech server, and point the client there.",
    "/v1/images": "Images are not served: pdserve generates text. Run an image server, and point the client there.",
    "/v1/rerank": "Reranking is not served. Run a reranker beside pdserve, and point the client there.",
    "/v1/score": "Scoring is not served. /v1/completions with echo and logprobs gives the log-probabilities of a text.",
    "/v1/responses": f"The Responses API is not served yet. {_GENERATE}",
    "/v1/messages": f"The Anthropic API is not served yet. {_GENERATE}",
    "/v1/assistants": f"Assistants are not served: pdserve keeps no conversations. {_GENERATE}",
    "/v1/threads": f"Threads are not served: pdserve keeps no conversations. {_GENERATE}",
    "/v1/files": f"Files are not served: pdserve keeps none. {_GENERATE}",
    "/v1/batches": f"Batches are not served. Send the requests at the same time: pdserve batches them. {_GENERATE}",
    "/v1/fine_tuning": "Fine-tuning is not served: pdserve only generates.",
}


def advice_for(path: str) -> str:
    """Message of the 404 for `path`."""
    for prefix, message in _NOT_SERVED.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return message
    shown = path if len(path) <= 200 else path[:200] + "…"
    return (
        f"There is no {shown}. The API is under /v1 (for example /v1/chat/completions); /openapi.json lists every path."
    )
