"""Owns a thread that moves bytes: it does one blocking call after the other, in the order they were given."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

_Call = tuple[Callable[[], None], asyncio.Future[None], asyncio.AbstractEventLoop]


class Mover:
    """The thread begins with the first call, and is a daemon: what blocks in it may not hold up the end of the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unfinished = 0

    @property
    def busy(self) -> bool:
        return self._unfinished > 0

    def start(self, call: Callable[[], None]) -> asyncio.Future[None]:
        """Resolves when `call` has returned, fails with what it raised. To cancel it stops nothing."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._unfinished += 1
        self._calls.put((call, done, loop))
        return done

    def end(self) -> None:
        """After the calls that were given."""
        if self._thread is not None:
            self._calls.put(None)

    def _run(self) -> None:
        while (given := self._calls.get()) is not None:
            call, done, loop = given
            problem: Exception | None = None
            try:
                call()
            except Exception as error:
                problem = error
            try:
                loop.call_soon_threadsafe(self._finish, done, problem)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _finish(self, done: asyncio.Future[None], problem: Exception | None) -> None:
        self._unfinished -= 1
        if done.done():
            return
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(problem)


async def until_done(future: asyncio.Future[None]) -> None:
    """Waits for the end of a call, however it ends. A cancel is raised then: until then the thread uses its buffer."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()  # seen
    if cancelled is not None:
        raise cancelled
