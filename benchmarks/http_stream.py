"""Owns the client's end of streamed completions: raw HTTP/1.1 and server-sent events on asyncio protocols.

Made for load, not for generality: what httpx spends per event would be a large part of what is to be measured.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

_HEAD_END = b"\r\n\r\n"
_EVENT_END = b"\n\n"


class StreamFailed(Exception):
    """The server did not answer with a whole stream."""


@dataclass(slots=True)
class StreamTimes:
    """One request: seconds on the monotonic clock. `event_s` has one entry per event that carried tokens."""

    sent_s: float
    event_s: list[float] = field(default_factory=list)
    last_event: bytes = b""  # before [DONE]: carries the usage

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s


class CompletionConnection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._pending = bytearray()
        self._in_body = False
        self._body = bytearray()
        self._times: StreamTimes | None = None
        self._done: asyncio.Future[StreamTimes] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> CompletionConnection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def post(self, head: bytes, body: bytes, deadline_s: float) -> StreamTimes:
        """Sends one request and reads its stream to [DONE]. Raises StreamFailed, TimeoutError."""
        assert self._done is None
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._times = StreamTimes(time.monotonic())
        self._transport.write(head + body)
        try:
            async with asyncio.timeout(deadline_s):
                return await self._done
        finally:
            self._done = self._times = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        self._pending += data
        if not self._in_body and not self._take_head():
            return
        ended = self._take_chunks()
        self._take_events()
        if ended:
            self._finish()

    def _take_head(self) -> bool:
        end = self._pending.find(_HEAD_END)
        if end < 0:
            return False
        head = bytes(self._pending[:end]).lower()
        if b" 200 " not in head.split(b"\r\n", 1)[0] + b" " or b"transfer-encoding: chunked" not in head:
            self._fail(bytes(self._pending[:500]).decode(errors="replace"))
            return False
        del self._pending[: end + len(_HEAD_END)]
        self._in_body = True
        return True

    def _take_chunks(self) -> bool:
        """Moves whole HTTP chunks to the body; True at the last one."""
        pending, start = self._pending, 0
        while (line_end := pending.find(b"\r\n", start)) >= 0:
            size = int(pending[start:line_end], 16)
            end = line_end + 2 + size
            if len(pending) < end + 2:
                break
            self._body += pending[line_end + 2 : end]
            start = end + 2
            if size == 0:
                del pending[:start]
                return True
        del pending[:start]
        return False

    def _take_events(self) -> None:
        times, body, start = self._times, self._body, 0
        if times is None:
            return
        now_s = time.monotonic()
        while (end := body.find(_EVENT_END, start)) >= 0:
            if body.startswith(b"data: {", start):
                times.event_s.append(now_s)
                times.last_event = bytes(body[start + 6 : end])
            start = end + 2
        del body[:start]

    def _finish(self) -> None:
        self._in_body = False
        times = self._times
        if times is None or self._done is None or self._done.done():
            return
        if b'"usage":{' not in times.last_event.replace(b" ", b"") or len(times.event_s) < 2:
            self._fail(f"the stream ended early: {times.last_event[:300].decode(errors='replace')}")
            return
        times.event_s.pop()  # of the usage: no token
        self._done.set_result(times)

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(StreamFailed(reason))
