"""Owns the receiving of one hand-off's KV: receives posted on announcement, straight into the blocks, verified on arrival."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from kv_transfer.arena import Arena
from kv_transfer.checksums import first_mismatch
from kv_transfer.segment_rules import SegmentRules
from kv_transfer.segments import Coverage, Span
from kv_transfer.transport import Connection
from pdserve.errors import KvCorrupt, PdserveError, TransferFailed
from pdserve.v1 import handoff_pb2


class ReceiveListener(Protocol):
    """What becomes of the receives. Called on the event loop."""

    def verified(self, tag: int) -> None:
        """The message arrived and every checksum matched."""

    def corrupt(self, error: KvCorrupt) -> None:
        """It arrived with wrong bytes."""

    def broken(self, error: PdserveError) -> None:
        """It did not arrive whole: nothing may be expected of this connection."""

    def idle(self) -> None:
        """A receive has ended; maybe it was the last."""


class SegmentReceiver:
    """Posts one receive per announced segment. While one is posted, its blocks may be written: `posted` says how many are."""

    def __init__(
        self, arena: Arena, blocks: tuple[int, ...], rules: SegmentRules, deadline_s: float, listener: ReceiveListener
    ) -> None:
        self._arena = arena
        self._blocks = blocks
        self._rules = rules
        self._deadline_s = deadline_s
        self._listener = listener
        self._receives: set[asyncio.Task[None]] = set()
        self._verified = Coverage(rules.layers, rules.first_block, rules.end_block)
        self._first_s = self._last_s = 0.0
        self.bytes = 0
        self.segments = 0

    @property
    def posted(self) -> int:
        return len(self._receives)

    @property
    def transfer_us(self) -> int:
        """First announcement to last verified block."""
        return max(0, round((self._last_s - self._first_s) * 1e6)) if self._first_s else 0

    def post(self, segment: handoff_pb2.Segment, connection: Connection) -> str | None:
        """Starts a receive; or why the segment is refused."""
        problem = self._rules.admit(segment, len(self._receives))
        if problem is not None:
            return problem
        self._first_s = self._first_s or time.monotonic()
        task = asyncio.create_task(self._receive(segment, connection))
        self._receives.add(task)
        task.add_done_callback(self._ended)
        return None

    async def _receive(self, segment: handoff_pb2.Segment, connection: Connection) -> None:
        target = self._arena.blocks(segment.layer, self._blocks[segment.first_block], segment.block_count)
        try:
            async with asyncio.timeout(self._deadline_s):
                await connection.recv(segment.tag, target)
        except TransferFailed as error:
            self._listener.broken(error)
        except TimeoutError:
            self._listener.broken(TransferFailed(f"KV message {segment.tag} was announced and did not come."))
        else:
            self._verify(segment, target)

    def _verify(self, segment: handoff_pb2.Segment, target: memoryview) -> None:
        wrong = first_mismatch(target, self._rules.block_bytes, segment.checksums)
        if wrong is not None:
            block = segment.first_block + wrong
            self._listener.corrupt(KvCorrupt(f"Checksum of block {block}, layer {segment.layer} does not match."))
            return
        self._last_s = time.monotonic()
        self.bytes += segment.length
        self.segments += 1
        self._verified.add(Span(segment.layer, segment.first_block, segment.block_count))
        self._listener.verified(segment.tag)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._receives.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._listener.broken(TransferFailed(f"Receiving failed: {error!r}."))
        self._listener.idle()

    def commit_problem(self, commit: handoff_pb2.Commit) -> str | None:
        """Why `commit` does not fit what was received; None where it does. Nothing is posted any more."""
        if (commit.segment_count, commit.byte_count) != (self.segments, self.bytes):
            return (
                f"Commit names {commit.segment_count} segments of {commit.byte_count} bytes, "
                f"{self.segments} of {self.bytes} came."
            )
        if not self._verified.complete:
            return f"Commit came, but {self._verified.missing} blocks did not."
        return None

    async def quiet(self) -> None:
        """Until no receive is posted."""
        if self._receives:
            await asyncio.wait(self._receives)

    def cancel(self) -> None:
        for task in self._receives:
            task.cancel()
