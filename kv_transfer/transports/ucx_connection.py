"""Owns UCX connections and the progress that drives them, over whichever library `ucx` has loaded. Imports neither."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Protocol, cast

from kv_transfer.transport import Buffer
from kv_transfer.transports.frames import MAX_FRAME_BYTES
from kv_transfer.transports.posted import check_buffer, check_target
from pdserve.errors import TransferFailed
from service_kit.logs import get_logger

_log = get_logger(__name__)

IDLE_S = 0.01  # between progress calls while nothing is transferred: bounds how late a new peer is seen
_GRACE_S = 1.0  # for an operation in progress to end by itself, before its endpoint is closed
_SPINS = 4  # progress calls per turn of the loop: one that finds nothing costs half a microsecond
_POLLED_PER_TURN = 2
_ALL_POLLED_EVERY = 16
_ABANDON_S = 0.25  # for a send to end after its endpoint was closed


class Arrival(Protocol):
    """ucxx's TagProbeResult: a message that came and is not received yet."""

    @property
    def matched(self) -> bool: ...

    @property
    def length(self) -> int: ...


class Endpoint(Protocol):
    """What both bindings' endpoints share."""

    async def send(self, buffer: Buffer | bytes, tag: int | None = None, force_tag: bool = False) -> None: ...

    async def recv(self, buffer: Buffer | bytearray, tag: int | None = None, force_tag: bool = False) -> None: ...

    def abort(self) -> None: ...


class ProbingEndpoint(Endpoint, Protocol):
    """ucxx only."""

    def tag_probe(self, tag: int | None = None, force_tag: bool = False, remove: bool = False) -> Arrival: ...

    async def recv_with_handle(self, buffer: Buffer | bytearray, probe_result: Arrival) -> None: ...


class Listener(Protocol):
    @property
    def port(self) -> int: ...

    def close(self) -> None: ...


class Binding(Protocol):
    """One of the two libraries, initialised. `probes`: its endpoints are `ProbingEndpoint`s."""

    @property
    def errors(self) -> tuple[type[Exception], ...]: ...

    @property
    def probes(self) -> bool: ...

    def progress(self) -> None: ...

    def create_listener(self, on_endpoint: Callable[[Endpoint], Awaitable[None]]) -> Listener: ...

    async def create_endpoint(self, host: str, port: int) -> Endpoint: ...


# ---- progress


class Pump:
    """Drives UCX on one event loop: fast while transfers are active, slow otherwise; polls for arrivals as it goes."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._loop = asyncio.get_running_loop()
        self._active = 0
        self._polls: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._turns = 0
        self._stopped = False
        self._next: asyncio.Handle = self._loop.call_soon(self._turn)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Progress at every turn of the loop inside."""
        self._active += 1
        if self._active == 1 and not self._stopped:
            self._next.cancel()
            self._next = self._loop.call_soon(self._turn)
        try:
            yield
        finally:
            self._active -= 1

    async def until(self, ready: Callable[[], bool]) -> None:
        """Polls `ready` at every turn; returns when it is true, raises what it raises."""
        waiting: asyncio.Future[None] = self._loop.create_future()
        self._polls[waiting] = ready
        try:
            await waiting
        finally:
            del self._polls[waiting]

    def _turn(self) -> None:
        for _ in range(_SPINS if self._active else 1):
            self._binding.progress()
        self._turns += 1
        # Messages come about in the order they were announced: probing all of them at every turn costs more than it finds.
        everyone = self._turns % _ALL_POLLED_EVERY == 0 or not self._active
        for waiting, ready in self._polls.items() if everyone else islice(self._polls.items(), _POLLED_PER_TURN):
            if waiting.done():
                continue
            try:
                if ready():
                    waiting.set_result(None)
            except TransferFailed as error:
                waiting.set_exception(error)
        if not self._stopped:
            self._next = self._loop.call_soon(self._turn) if self._active else self._loop.call_later(IDLE_S, self._turn)

    def stop(self) -> None:
        self._stopped = True
        self._next.cancel()


# ---- connections


class UcxConnection:
    """One endpoint. Tags match worker-wide: whoever hands them out never repeats one."""

    def __init__(self, endpoint: Endpoint, binding: Binding, pump: Pump) -> None:
        self._endpoint = endpoint
        self._binding = binding
        self._pump = pump
        self._aborted = False
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # closed on this side
        self._abandoned: list[Buffer] = []  # kept mapped: UCX may still read them
        self._receiving: set[int] = set()

    @property
    def closed(self) -> bool:
        return self._aborted or is_closed(self._endpoint)

    async def send(self, tag: int, buffer: Buffer) -> None:
        """See `transport.Connection`. A cancelled send closes the connection: UCX may still read the buffer.

        Towards a stopped process UCX leaves some sends unfinished even after the endpoint was closed. They are abandoned
        `_ABANDON_S` later: what they might still read goes to a peer that has fenced, or fails its checksums.
        """
        check_buffer(buffer)
        self._check_open()
        task = asyncio.create_task(self._start(lambda: self._endpoint.send(buffer, tag=tag, force_tag=True)))
        try:
            with self._pump.active():
                await asyncio.wait((task, self._gone), return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    await asyncio.wait((task,), timeout=_ABANDON_S)
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            task.cancel()
        try:
            await task
        except self._binding.errors as error:
            raise TransferFailed(f"KV connection lost while sending message {tag}: {error}.") from error
        except asyncio.CancelledError:
            self._abandoned.append(buffer)
            raise TransferFailed(f"KV connection closed while sending message {tag}.") from None
        # After a cancel inside the library send returns None as if it had succeeded.
        self._check_open()

    async def recv(self, tag: int, buffer: Buffer) -> None:
        check_target(buffer)
        if tag in self._receiving:
            raise TransferFailed(f"A receive for tag {tag} is posted already: tags are used once.")
        self._check_open()
        self._receiving.add(tag)
        try:
            if self._binding.probes:
                await self._recv_arrived(cast(ProbingEndpoint, self._endpoint), tag, buffer)
            else:
                await self._recv_copied(tag, buffer)
        finally:
            self._receiving.discard(tag)

    async def _recv_arrived(self, endpoint: ProbingEndpoint, tag: int, buffer: Buffer) -> None:
        def arrived() -> bool:
            if self._aborted:
                raise TransferFailed("KV connection was closed on this side.")
            if endpoint.tag_probe(tag, force_tag=True).matched:
                return True
            if is_closed(endpoint):
                raise TransferFailed(f"KV connection lost: the peer is gone before message {tag} came.")
            return False

        with self._pump.active():
            await self._pump.until(arrived)
            arrival = endpoint.tag_probe(tag, force_tag=True, remove=True)
            if arrival.length != len(buffer):
                await self._throw_away(endpoint, arrival)
                raise TransferFailed(f"KV message {tag} has {arrival.length} bytes, expected were {len(buffer)}.")
            await self._finish(lambda: endpoint.recv_with_handle(buffer, arrival), f"receiving message {tag}")

    async def _throw_away(self, endpoint: ProbingEndpoint, arrival: Arrival) -> None:
        if arrival.length > MAX_FRAME_BYTES:
            await self.close()
            return
        await self._finish(
            lambda: endpoint.recv_with_handle(bytearray(arrival.length), arrival), "discarding a message"
        )

    async def _recv_copied(self, tag: int, buffer: Buffer) -> None:
        """For ucp: a cancelled receive stays posted there, so it gets a buffer of its own. It cannot tell a short message;
        the hand-off's checksums do."""
        landing = bytearray(len(buffer))
        with self._pump.active():
            await self._finish(
                lambda: self._endpoint.recv(landing, tag=tag, force_tag=True), f"receiving message {tag}"
            )
        self._check_open()
        buffer[:] = landing

    async def _finish(self, operation: Callable[[], Awaitable[None]], what: str) -> None:
        """Runs `operation`; when it returns or raises, UCX does not write into the operation's buffer any more."""
        task = asyncio.create_task(self._start(operation))
        with self._pump.active():
            try:
                await asyncio.shield(task)
            except self._binding.errors as error:
                raise TransferFailed(f"KV connection lost while {what}: {error}.") from error
            except asyncio.CancelledError:
                await self._quiesce(task)
                raise

    async def _start(self, operation: Callable[[], Awaitable[None]]) -> None:
        self._check_open()  # again: a close may come between the call and the task's first turn
        await operation()

    async def _quiesce(self, task: asyncio.Task[None]) -> None:
        """The caller gave up: a short operation may end by itself, else its endpoint is closed, which ends it."""
        await asyncio.wait((task,), timeout=_GRACE_S)
        if not task.done():
            await self.close()
        while not task.done():
            await asyncio.wait((task,), timeout=_GRACE_S)
            if not task.done():
                _log.error("ucx_receive_outlives_its_endpoint")
        if not task.cancelled():
            task.exception()

    def _check_open(self) -> None:
        if self.closed:
            raise TransferFailed("KV connection is closed.")

    async def close(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._gone.set_result(None)
            self._endpoint.abort()


def is_closed(endpoint: object) -> bool:
    """`closed` is a property in ucxx and a method in ucp."""
    closed: object = getattr(endpoint, "closed", True)
    return bool(closed() if callable(closed) else closed)
