"""Owns the receives of one tcp connection: the loop posts them, the threads that read its sockets take them."""

from __future__ import annotations

import threading

from kv_transfer.transport import Buffer
from kv_transfer.transports.posted import PostedReceive, PostedReceives
from pdserve.errors import TransferFailed


class Inbox:
    """`post_s`: how long a message may wait for its receive. What was taken is for its taker to complete or fail."""

    def __init__(self, post_s: float) -> None:
        self._post_s = post_s
        self._posted = PostedReceives()
        self._changed = threading.Condition()
        self._closed = False

    def post(self, tag: int, buffer: Buffer) -> PostedReceive:
        with self._changed:
            receive = self._posted.post(tag, buffer)
            self._changed.notify_all()
        return receive

    def abandon(self, receive: PostedReceive) -> bool:
        """True where nobody has taken it, nor will."""
        with self._changed:
            return self._posted.abandon(receive)

    def close(self, message: str) -> None:
        """Fails what nobody has taken, now and later."""
        with self._changed:
            self._closed = True
            self._posted.fail_all(message)
            self._changed.notify_all()

    def take(self, tag: int) -> PostedReceive | None:
        """For a thread: waits until the receive is posted. None: its message is to be thrown away.

        Raises TransferFailed where it is not posted in time, or the connection is closed.
        """
        with self._changed:
            taken: PostedReceive | None = None

            def settled() -> bool:
                nonlocal taken
                taken = self._posted.take(tag)
                return taken is not None or self._posted.take_abandoned(tag) or self._closed

            if not self._changed.wait_for(settled, self._post_s):
                raise TransferFailed(f"message {tag} came, but no receive was posted for it in {self._post_s} s")
            if self._closed and taken is None:
                raise TransferFailed("closed on this side")
            return taken
