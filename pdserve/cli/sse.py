"""Owns reading server-sent events of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pdserve.cli.record import Record
from pdserve.errors import InternalError, error_from_reason

DONE = "[DONE]"


def events(lines: Iterable[str]) -> Iterator[Record]:
    """Payloads up to [DONE]. Raises the typed error of an error event, InternalError where the stream breaks off."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # comments keep the connection alive
        payload = line.removeprefix("data:").strip()
        if payload == DONE:
            return
        event = Record.parse(payload)
        if event.has("error"):
            error = event.record("error")
            raise error_from_reason(error.text("code"), error.text("message"))
        yield event
    raise InternalError("The stream ended before it was done. See: pdserve status")
