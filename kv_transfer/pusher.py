"""Owns the pushing of one hand-off's KV: blocks that become ready are cut, announced and sent within the peer's window."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.arena import Arena
from kv_transfer.checksums import block_checksums
from kv_transfer.layout import TransferPlan
from kv_transfer.peers import PeerLink
from kv_transfer.segments import Coverage, PendingSpans, Span, SpanCutter, runs_of
from kv_transfer.tags import TagRange
from pdserve.errors import InternalError, PdserveError, TransferFailed
from pdserve.v1 import handoff_pb2

# Layers of a chunk become ready one by one while the next is computed. Those that are not of the last chunk may wait for one another:
# each message that goes by itself wakes both sides, for more than its bytes take.
GATHER_S = 0.03
GATHER_BYTES = 2 * 2**20

Put = Callable[[handoff_pb2.HandoffRequest], None]
OnError = Callable[[PdserveError], None]


@dataclass(frozen=True, slots=True)
class Cutting:
    """What the grant says about cutting. runs: of adjacent destination blocks; the first `first_block` are there already."""

    blocks: int
    first_block: int
    runs: tuple[int, ...]
    max_blocks: int  # of one message


class SegmentPusher:
    """Fed by the worker, drained by `push`. A message holds a slot of the window until the peer confirms it."""

    def __init__(self, arena: Arena, tags: TagRange, put: Put, on_error: OnError) -> None:
        self._arena = arena
        self._tags = tags
        self._put = put
        self._on_error = on_error
        self._wake = asyncio.Event()  # news for `push`
        self._pending = PendingSpans()
        self._source_blocks: tuple[int, ...] = ()
        self._first_tokens: list[handoff_pb2.FirstToken] | None = None
        self._all_put = False  # every segment, and `push` waits for `finish` alone
        self._committed = False
        self._link: PeerLink | None = None
        self._credits: dict[int, float] = {}  # tag -> when it was announced, until it is confirmed
        self.sends: set[asyncio.Task[None]] = set()
        self.segments = 0
        self.bytes = 0
        self.first_send_s = 0.0
        self.last_done_s = 0.0

    # ---- fed by the worker

    def source_blocks(self, block_ids: Sequence[int]) -> None:
        self._source_blocks = tuple(block_ids)
        self._wake.set()

    def ready(self, span: Span) -> None:
        self._pending.add(span)
        self._wake.set()

    def finish(self, first_tokens: Sequence[tuple[int, int]]) -> None:
        self._first_tokens = [handoff_pb2.FirstToken(choice=choice, token_id=token) for choice, token in first_tokens]
        if self._all_put and not self._pending:
            self._commit(self._first_tokens)  # not a turn of the loop later: the second token waits for it
        self._wake.set()

    # ---- drained by the hand-off

    async def push(self, plan: TransferPlan, cutting: Cutting, link: PeerLink) -> None:
        """Until all is announced and Commit is put. Raises InternalError where the worker announced wrongly."""
        self._link = link
        coverage = Coverage(plan.layers, cutting.first_block, cutting.blocks)
        while not self._source_blocks:
            await self._news()
        cutter = SpanCutter(runs_of(self._source_blocks[: cutting.blocks]), cutting.runs, cutting.max_blocks)
        while self._first_tokens is None or self._pending:
            if not self._pending:
                self._all_put = coverage.complete
                await self._news()
                continue
            await self._gather(cutting.blocks, plan.block_bytes)
            while self._pending:
                span = _without_cached(self._pending.pop(), cutting.first_block)
                if span is None:
                    continue
                if (problem := coverage.problem(span)) is not None:
                    raise InternalError(f"KV announced wrongly: {problem}.")
                coverage.add(span)
                for piece in cutter.cut(span):
                    await link.window.acquire()
                    self._send(piece, plan.block_bytes, link)
        if not coverage.complete:
            raise InternalError(f"{coverage.missing} KV blocks were never announced.")
        self._commit(self._first_tokens)

    def _commit(self, first_tokens: list[handoff_pb2.FirstToken]) -> None:
        if not self._committed:
            self._committed = True
            commit = handoff_pb2.Commit(segment_count=self.segments, byte_count=self.bytes, first_tokens=first_tokens)
            self._put(handoff_pb2.HandoffRequest(commit=commit))

    async def _gather(self, blocks: int, block_bytes: int) -> None:
        """Until what is pending must go, or GATHER_S have passed since it was looked at first."""
        many_blocks = max(1, GATHER_BYTES // block_bytes)
        try:
            async with asyncio.timeout(GATHER_S):
                while self._first_tokens is None and not self._pending.urgent(blocks, many_blocks):
                    await self._news()
        except TimeoutError:
            return

    async def _news(self) -> None:
        self._wake.clear()
        try:
            await self._wake.wait()
        finally:
            self._all_put = False

    def _send(self, span: Span, block_bytes: int, link: PeerLink) -> None:
        """Announces and starts one message; the caller holds a slot of the window."""
        data = self._arena.blocks(span.layer, self._source_blocks[span.first_block], span.block_count)
        tag = self._tags.first + self.segments
        self.segments += 1
        self.bytes += len(data)
        now_s = time.monotonic()
        self.first_send_s = self.first_send_s or now_s
        self._credits[tag] = now_s
        segment = handoff_pb2.Segment(
            tag=tag,
            layer=span.layer,
            first_block=span.first_block,
            block_count=span.block_count,
            length=len(data),
            checksums=block_checksums(data, block_bytes),
        )
        self._put(handoff_pb2.HandoffRequest(segment=segment))
        task = asyncio.create_task(self._transmit(link, tag, data))
        self.sends.add(task)
        task.add_done_callback(self.sends.discard)

    async def _transmit(self, link: PeerLink, tag: int, data: memoryview) -> None:
        try:
            await link.connection.send(tag, data)
        except TransferFailed as error:
            self._on_error(error)

    def confirmed(self, tag: int) -> None:
        """The peer received and verified the message."""
        if self._credits.pop(tag, None) is not None and self._link is not None:
            self.last_done_s = time.monotonic()
            self._link.window.release()

    def stalled_s(self) -> float:
        """How long a message has waited for its confirmation with none coming."""
        oldest_s = min(self._credits.values(), default=None)
        return 0.0 if oldest_s is None else time.monotonic() - max(oldest_s, self.last_done_s)

    def return_credits(self) -> None:
        """The hand-off is over: others may use its slots of the window."""
        if self._link is not None:
            for _ in self._credits:
                self._link.window.release()
        self._credits.clear()


def _without_cached(span: Span, first_block: int) -> Span | None:
    """`span` without the blocks that lie at the destination already."""
    start = max(span.first_block, first_block)
    return Span(span.layer, start, span.end_block - start) if start < span.end_block else None
