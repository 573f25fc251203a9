"""Owns nixl connections: the sender says on a socket where a message lies, the receiver reads it and says that it has.

One-sided, so the receiver alone decides when its buffer is written, and it writes nothing before a receive is posted. The end
of the socket is the end of the peer. While a peer is connected it can read and write all memory that was registered for
it: with an arena, the whole arena (ADR 1). A sender that gives up closes the connection; a read that ends just then
may hold what was written there since, as over UCX: the hand-off's checksums are what finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass, field
from typing import cast

from kv_transfer.transport import Buffer
from kv_transfer.transports.nixl_frames import Frame, FrameReader, Said, pack
from kv_transfer.transports.nixl_library import Agent, NixlLibrary, Read
from kv_transfer.transports.nixl_memory import NixlMemory
from kv_transfer.transports.nixl_reach import address_of, can_read
from kv_transfer.transports.posted import PostedReceive, PostedReceives, check_buffer, check_target
from kv_transfer.transports.pump import Pump
from pdserve.errors import TransferFailed

_SPINS = 4  # progress calls per turn: whether one found something it does not say
_GRACE_S = 1.0  # for a read in progress to end by itself, before the connection is closed
_MAX_OFFERED = 4096  # messages that no receive was posted for


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A message that is being read; `ended` resolves when nobody writes into the receive's buffer any more."""

    receive: PostedReceive
    read: Read
    memory: contextlib.ExitStack
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class NixlConnection(asyncio.Protocol):
    """One agent and one socket, both owned."""

    def __init__(self, agent: Agent, pump: Pump, library: NixlLibrary) -> None:
        self._agent = agent
        self._direct = library.direct
        self._pump = pump
        self._errors = library.errors
        self._memory = NixlMemory(agent)
        self._frames = FrameReader()
        self._wire: asyncio.WriteTransport | None = None
        self._introduction = bytearray(agent.metadata())  # stays where it is: the peer reads it to see whether it can
        self._met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: str | None = None
        self._posted = PostedReceives()
        self._offered: dict[int, Frame] = {}
        self._arriving: dict[int, _Arriving] = {}
        self._sending: dict[int, asyncio.Future[None]] = {}

    async def meet(self, sock: socket.socket) -> None:
        """Takes `sock` over and waits until both agents know each other. Raises TransferFailed or one of the library's errors."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self, sock=sock)
            where = address_of(self._introduction)
            self._say(Frame(Said.MEET, os.getpid(), where, attached=bytes(self._introduction)))
            await self._met
        except BaseException:
            self._shut("the peer did not come in")
            raise
        self._pump.add(self)

    @property
    def closed(self) -> bool:
        return self._error is not None

    @property
    def busy(self) -> bool:
        return bool(self._arriving or self._sending)

    async def send(self, tag: int, buffer: Buffer) -> None:
        """See `transport.Connection`. A cancelled send closes the connection: the peer may be reading the buffer."""
        check_buffer(buffer)
        self._check_open()
        if tag in self._sending:
            raise TransferFailed(f"Message {tag} is being sent already: tags are used once.")
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending[tag] = taken
        try:
            with self._memory.readable(buffer) as (address, attached):
                self._say(Frame(Said.OFFER, tag, address, len(buffer), attached))
                self._pump.wake()
                await taken
        except TransferFailed:
            raise
        except self._errors as error:
            raise TransferFailed(f"KV connection lost while sending message {tag}: {error}.") from error
        except asyncio.CancelledError:
            self._shut("a send was cancelled")
            raise
        finally:
            del self._sending[tag]

    async def recv(self, tag: int, buffer: Buffer) -> None:
        check_target(buffer)
        self._check_open()
        if tag in self._arriving:
            raise TransferFailed(f"A receive for tag {tag} is posted already: tags are used once.")
        receive = self._posted.post(tag, buffer)
        offer = self._offered.pop(tag, None)
        if offer is not None:
            self._match(offer)
        try:
            await receive.done
        except asyncio.CancelledError:
            await self._quiesce(tag)
            raise
        finally:
            self._posted.abandon(receive)

    async def _quiesce(self, tag: int) -> None:
        arriving = self._arriving.get(tag)
        if arriving is None:
            return
        try:
            await asyncio.wait((arriving.ended,), timeout=_GRACE_S)
        finally:
            if not arriving.ended.done():
                del arriving  # it holds the agent, which must go now
                self._shut("a read was cancelled")

    def turn(self, spins: int, *, everyone: bool) -> bool:
        """See `pump.Turned`. Everyone's turn it is always: a read is asked for in a microsecond."""
        came: list[int] = []
        try:
            for _ in range(min(spins, _SPINS)):
                self._agent.progress()
            came += [tag for tag, arriving in self._arriving.items() if arriving.read.came()]
            for tag in came:
                self._end(tag)
        except self._errors as error:
            self._shut(str(error))
        return bool(came)

    def arm(self) -> int | None:
        """See `pump.Turned`."""
        return None

    def _end(self, tag: int) -> None:
        arriving = self._arriving.pop(tag)
        arriving.read.release()
        arriving.memory.close()
        arriving.receive.complete()
        arriving.ended.set_result(None)
        self._say(Frame(Said.TAKEN, tag))

    # ---- what the peer says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.WriteTransport, transport)  # uvloop's is none of asyncio's classes

    def connection_lost(self, exc: Exception | None) -> None:
        self._shut(f"the peer is gone: {exc or 'it closed'}")

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                if self._error is None:
                    self._hear(frame)
        except self._errors as error:
            self._shut(str(error))

    def _hear(self, frame: Frame) -> None:
        if frame.attached:
            self._agent.learn(frame.attached)
        if not self._met.done():
            if frame.said != Said.MEET:
                raise TransferFailed("The peer's first frame does not say who it is.")
            if self._direct and not can_read(frame.tag, frame.address, frame.attached):
                raise TransferFailed("The peer's memory cannot be read from here (process_vm_readv): use ucx or tcp.")
            self._met.set_result(None)
        elif frame.said == Said.OFFER:
            self._match(frame)
        elif frame.said == Said.TAKEN and (taken := self._sending.get(frame.tag)) and not taken.done():
            taken.set_result(None)

    def _match(self, offer: Frame) -> None:
        receive = self._posted.take(offer.tag)
        if receive is None and not self._posted.take_abandoned(offer.tag):
            if len(self._offered) >= _MAX_OFFERED:
                raise TransferFailed("The peer offers more than was asked for.")
            self._offered[offer.tag] = offer
        elif receive is None or not receive.wanted:
            self._say(Frame(Said.TAKEN, offer.tag))
        elif len(receive.buffer) != offer.length_bytes:
            receive.fail(f"KV message {offer.tag} has {offer.length_bytes} bytes, expected were {len(receive.buffer)}.")
            self._say(Frame(Said.TAKEN, offer.tag))
        else:
            self._fetch(receive, offer)

    def _fetch(self, receive: PostedReceive, offer: Frame) -> None:
        memory = contextlib.ExitStack()
        try:
            memory.enter_context(self._memory.writable(receive.buffer))
            read = self._agent.read(receive.buffer, offer.address)
        except self._errors as error:
            memory.close()
            receive.fail(f"KV message {offer.tag} cannot be read: {error}.")
            self._shut(str(error))
            return
        self._arriving[offer.tag] = _Arriving(receive, read, memory)
        self._pump.wake()

    def _say(self, frame: Frame) -> None:
        if self._wire is not None and self._error is None:
            self._wire.write(pack(frame))

    def _check_open(self) -> None:
        if self._error is not None:
            raise TransferFailed(f"KV connection is closed: {self._error}.")

    # ---- the end

    async def close(self) -> None:
        self._shut("closed on this side")

    def _shut(self, reason: str) -> None:
        if self._error is not None:
            return
        self._error = reason
        self._pump.remove(self)
        if self._wire is not None:
            self._wire.close()
        waiting = self._give_up_reads()
        with contextlib.suppress(*self._errors):
            self._agent.drop()
        message = f"KV connection lost: {reason}."
        for receive, ended in waiting:
            receive.fail(message)
            if not ended.done():
                ended.set_result(None)
        self._posted.fail_all(message)
        for pending in (self._met, *self._sending.values()):
            if not pending.done():
                pending.set_exception(TransferFailed(message))

    def _give_up_reads(self) -> list[tuple[PostedReceive, asyncio.Future[None]]]:
        """Keeps nothing that holds the agent: the library touches memory until its agent goes."""
        given_up, self._arriving = self._arriving, {}
        for arriving in given_up.values():
            with contextlib.suppress(*self._errors):
                arriving.read.release()
            with contextlib.suppress(*self._errors):
                arriving.memory.close()
        return [(arriving.receive, arriving.ended) for arriving in given_up.values()]
