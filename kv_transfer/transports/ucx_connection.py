"""Owns UCX connections: endpoints on a lane of their own, and the socket that tells at once when the peer's process ends.

No receive is posted before its message has arrived (tag probe): a waiting receive burns a core, and the probe gives the exact
length and leaves nothing behind after a cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Iterator, Sequence

from kv_transfer.transport import Buffer
from kv_transfer.transports.frames import MAX_FRAME_BYTES
from kv_transfer.transports.posted import check_buffer, check_target
from kv_transfer.transports.ucx_lane import Lane, Steps
from kv_transfer.transports.ucx_library import Arrival, Endpoint
from pdserve.errors import TransferFailed
from service_kit.logs import get_logger

_log = get_logger(__name__)

_GRACE_S = 1.0  # for an operation in progress to end by itself, before its endpoint is closed
_ABANDON_S = 0.25  # for a send to end after its endpoint was closed


class UcxConnection:
    """`watch`: a connected socket on which the peer says nothing: its end is the peer's. Owned, as lane and endpoints are.

    A message may go over any of the endpoints: tags match in the whole lane. The end of one is the end of all.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], lane: Lane, watch: socket.socket, errors: tuple[type[Exception], ...]
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._endpoint = self._endpoints[0]  # receives are posted here
        self._turns = itertools.cycle(self._endpoints)
        self._lane = lane
        self._watch = watch
        self._errors = errors
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        # The lane is driven no more. Where UCX lets the peer write a message straight into its receive's buffer, it does so only while
        # driven: so a receive that failed with its connection ends after this.
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._operations = 0
        self._receiving: set[int] = set()
        self._loop.add_reader(watch.fileno(), self._shut)

    @property
    def closed(self) -> bool:
        return self._gone.done() or self._lost

    @property
    def _lost(self) -> bool:
        return any(endpoint.closed for endpoint in self._endpoints)

    async def send(self, tag: int, buffer: Buffer) -> None:
        """See `transport.Connection`. A cancelled send closes the connection: UCX may still read the buffer.

        Towards a stopped process UCX leaves some sends unfinished even after the endpoint was closed. They are abandoned
        `_ABANDON_S` later, when the lane goes too.
        """
        check_buffer(buffer)
        self._check_open()
        with self._operation():
            sending = self._lane.start(next(self._turns).send(buffer, tag=tag, force_tag=True))
            try:
                await asyncio.wait((sending, self._gone), return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    await asyncio.wait((sending,), timeout=_ABANDON_S)
            except asyncio.CancelledError:
                await self.close()
                raise
            finally:
                sending.cancel()
            try:
                await sending
            except self._errors as error:
                raise TransferFailed(f"KV connection lost while sending message {tag}: {error}.") from error
            except asyncio.CancelledError:
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
            with self._operation():
                await self._recv_arrived(tag, buffer)
        finally:
            self._receiving.discard(tag)
            if self._gone.done():
                await asyncio.wait((self._ended,))

    async def _recv_arrived(self, tag: int, buffer: Buffer) -> None:
        def arrived() -> bool:
            if self._gone.done():
                raise TransferFailed("KV connection is closed.")
            if self._endpoint.tag_probe(tag, force_tag=True).matched:
                return True
            if self._lost:
                raise TransferFailed(f"KV connection lost: the peer is gone before message {tag} came.")
            return False

        await self._lane.until(arrived)
        self._check_open()
        arrival = self._endpoint.tag_probe(tag, force_tag=True, remove=True)
        if arrival.length != len(buffer):
            await self._throw_away(arrival)
            raise TransferFailed(f"KV message {tag} has {arrival.length} bytes, expected were {len(buffer)}.")
        await self._finish(self._endpoint.recv_with_handle(buffer, arrival), f"receiving message {tag}")

    async def _throw_away(self, arrival: Arrival) -> None:
        if arrival.length > MAX_FRAME_BYTES:
            await self.close()
            return
        await self._finish(self._endpoint.recv_with_handle(bytearray(arrival.length), arrival), "discarding a message")

    async def _finish(self, operation: Steps, what: str) -> None:
        """Runs `operation`; when it returns or raises, UCX does not write into the operation's buffer any more."""
        ending = self._lane.start(operation)
        try:
            await asyncio.shield(ending)
        except self._errors as error:
            raise TransferFailed(f"KV connection lost while {what}: {error}.") from error
        except asyncio.CancelledError:
            await self._quiesce(ending)
            raise

    async def _quiesce(self, ending: asyncio.Future[None]) -> None:
        """The caller gave up: a short operation may end by itself, else its endpoint is closed, which ends it."""
        await asyncio.wait((ending,), timeout=_GRACE_S)
        if not ending.done():
            await self.close()
        while not ending.done():
            await asyncio.wait((ending,), timeout=_GRACE_S)
            if not ending.done():
                _log.error("ucx_receive_outlives_its_endpoint")
        if not ending.cancelled():
            ending.exception()

    def _check_open(self) -> None:
        if self.closed:
            raise TransferFailed("KV connection is closed.")

    # ---- the end

    async def close(self) -> None:
        self._shut()

    def _shut(self) -> None:
        if self._gone.done():
            return
        self._gone.set_result(None)
        self._loop.remove_reader(self._watch.fileno())
        self._watch.close()
        for endpoint in self._endpoints:
            endpoint.abort()
        self._lane.wake()
        self._drop_when_unused()

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        self._operations += 1
        try:
            with self._lane.active():
                yield
        finally:
            self._operations -= 1
            self._drop_when_unused()

    def _drop_when_unused(self) -> None:
        if self._gone.done() and not self._operations and not self._ended.done():
            self._lane.drop()
            self._ended.set_result(None)
