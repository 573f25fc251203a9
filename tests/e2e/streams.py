"""Owns one streamed request of the tests: token ids as they arrive, with a hook in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx

STREAM_S = 120.0


@dataclass(slots=True)
class Streamed:
    """What one stream brought, per choice."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    done: bool = False
    error: str = ""


async def events(
    client: httpx.AsyncClient, body: dict[str, object], request_id: str = ""
) -> AsyncIterator[dict[str, object] | str]:
    """SSE payloads of a streamed completion: dicts, then "[DONE]"."""
    headers = {"x-request-id": request_id} if request_id else {}
    asked = {**body, "stream": True, "return_token_ids": True}
    async with client.stream("POST", "/v1/completions", json=asked, headers=headers) as answer:
        if answer.status_code != 200:
            yield {"error": {"message": (await answer.aread()).decode(), "code": str(answer.status_code)}}
            return
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                payload = line[len("data: ") :]
                yield payload if payload == "[DONE]" else json.loads(payload)


def fold(streamed: Streamed, event: dict[str, object] | str) -> None:
    """Adds one event to what has arrived."""
    if isinstance(event, str):
        streamed.done = True
        return
    if "error" in event:
        streamed.error = json.dumps(event["error"])
        return
    choices = event["choices"]
    assert isinstance(choices, list)
    for choice in choices:
        index = choice["index"]
        streamed.token_ids.setdefault(index, []).extend(choice.get("token_ids") or [])
        streamed.text[index] = streamed.text.get(index, "") + choice["text"]
        if choice.get("logprobs"):
            streamed.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
        if choice.get("finish_reason"):
            streamed.finish[index] = choice["finish_reason"]


async def complete(client: httpx.AsyncClient, body: dict[str, object], request_id: str = "") -> Streamed:
    """To its end. A stream that only keeps alive would never run into a deadline of the client's."""
    streamed = Streamed()
    async with asyncio.timeout(STREAM_S):
        async for event in events(client, body, request_id):
            fold(streamed, event)
    return streamed
