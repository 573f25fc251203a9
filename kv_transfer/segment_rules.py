"""Owns the rules of announced segments: tags used once, blocks granted once, exact lengths, bounded counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.checksums import CHECKSUM_BYTES
from kv_transfer.layout import TransferPlan
from kv_transfer.segments import Coverage, Span, runs_of
from kv_transfer.tags import TagRange
from kv_transfer.transports.frames import MAX_FRAME_BYTES
from pdserve.v1 import handoff_pb2

# Upper bound of transfer.max_in_flight: no peer may have more receives posted here.
MAX_POSTED = 256


class SegmentRules:
    """Judges the announcements of one hand-off, in the order they come."""

    def __init__(self, plan: TransferPlan, blocks: Sequence[int], first_block: int, tags: TagRange) -> None:
        self.first_block = first_block
        self.end_block = len(blocks)
        self.layers = plan.layers
        self.block_bytes = plan.block_bytes
        self.runs = runs_of(blocks)
        self._plan = plan
        self._tags = tags
        self._used_tags: set[int] = set()
        self._announced = Coverage(plan.layers, first_block, self.end_block)
        self._blocks = blocks

    def admit(self, segment: handoff_pb2.Segment, posted: int) -> str | None:
        """Why the segment is refused; None: its tag and blocks are used now. posted: receives in progress."""
        span = Span(segment.layer, segment.first_block, segment.block_count)
        problem = self._size_problem(segment) or self._tag_problem(segment.tag) or self._announced.problem(span)
        if problem is not None:
            return problem
        if len(runs_of(self._blocks[span.first_block : span.end_block])) != 1:
            return f"blocks {span.first_block}..{span.end_block - 1} are not adjacent here"
        if posted >= MAX_POSTED:
            return f"{posted} messages are in flight"
        self._used_tags.add(segment.tag)
        self._announced.add(span)
        return None

    def _size_problem(self, segment: handoff_pb2.Segment) -> str | None:
        if segment.length != segment.block_count * self._plan.block_bytes:
            return f"{segment.length} bytes for {segment.block_count} blocks of {self._plan.block_bytes}"
        if segment.length > MAX_FRAME_BYTES:
            return f"{segment.length} bytes are more than {MAX_FRAME_BYTES}"
        if len(segment.checksums) != segment.block_count:
            return f"{len(segment.checksums)} checksums for {segment.block_count} blocks"
        if any(len(checksum) != CHECKSUM_BYTES for checksum in segment.checksums):
            return f"a checksum has not {CHECKSUM_BYTES} bytes"
        return None

    def _tag_problem(self, tag: int) -> str | None:
        if tag not in self._tags:
            return f"tag {tag} was not granted"
        if tag in self._used_tags:
            return f"tag {tag} was used before"
        return None
