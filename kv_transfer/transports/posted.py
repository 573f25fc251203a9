"""Owns the receives posted on one connection: buffers that wait for their tag, and tags whose message is unwanted now."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from kv_transfer.transport import Buffer
from pdserve.errors import TransferFailed

# Cancelled receives whose message may still come; past this bound the peer announces what it never sends.
_MAX_ABANDONED = 4096


@dataclass(frozen=True, slots=True, eq=False)
class PostedReceive:
    """`done` resolves when `buffer` is filled, or fails; nobody writes into `buffer` afterwards."""

    tag: int
    buffer: Buffer
    done: asyncio.Future[None]

    @property
    def wanted(self) -> bool:
        return not self.done.done()

    def complete(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, message: str) -> None:
        if not self.done.done():
            self.done.set_exception(TransferFailed(message))


class PostedReceives:
    """Matches by tag. A tag is posted once; the message of an abandoned receive is to be thrown away when it comes."""

    def __init__(self) -> None:
        self._waiting: dict[int, PostedReceive] = {}
        self._abandoned: OrderedDict[int, None] = OrderedDict()

    def post(self, tag: int, buffer: Buffer) -> PostedReceive:
        if tag in self._waiting:
            raise TransferFailed(f"A receive for tag {tag} is posted already: tags are used once.")
        receive = PostedReceive(tag, buffer, asyncio.get_running_loop().create_future())
        self._waiting[tag] = receive
        return receive

    def abandon(self, receive: PostedReceive) -> bool:
        """The receiver was cancelled. True where the message has not begun to come: its tag is remembered."""
        if self._waiting.get(receive.tag) is not receive:
            return False
        del self._waiting[receive.tag]
        self._abandoned[receive.tag] = None
        if len(self._abandoned) > _MAX_ABANDONED:
            self._abandoned.popitem(last=False)
        return True

    def take(self, tag: int) -> PostedReceive | None:
        """The receive that waits for `tag`; it is not waiting any more."""
        return self._waiting.pop(tag, None)

    def take_abandoned(self, tag: int) -> bool:
        """True where the message under `tag` is to be thrown away."""
        if tag not in self._abandoned:
            return False
        del self._abandoned[tag]
        return True

    def fail_all(self, message: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for receive in waiting.values():
            receive.fail(message)


def check_buffer(buffer: Buffer) -> None:
    """Raises TransferFailed for what a transport would send wrongly without telling: strided or typed views."""
    if not buffer.c_contiguous or buffer.format != "B" or buffer.ndim != 1:
        raise TransferFailed("A KV buffer must be a contiguous one-dimensional view of bytes.")
    if not len(buffer):
        raise TransferFailed("A KV message has at least one byte.")


def check_target(buffer: Buffer) -> None:
    """`check_buffer`, and writable."""
    check_buffer(buffer)
    if buffer.readonly:
        raise TransferFailed("A receive needs a writable buffer.")
