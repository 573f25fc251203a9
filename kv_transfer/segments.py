"""Owns how block ranges become KV messages: runs of adjacent blocks, cutting, merging, and what has arrived. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.errors import InternalError


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks [first_block, first_block + block_count) of one layer, ordinals in the request's block table."""

    layer: int
    first_block: int
    block_count: int

    @property
    def end_block(self) -> int:
        return self.first_block + self.block_count


def runs_of(block_ids: Sequence[int]) -> list[int]:
    """Lengths of the maximal ranges of adjacent ids, in order."""
    runs: list[int] = []
    for ordinal, block_id in enumerate(block_ids):
        if ordinal and block_id == block_ids[ordinal - 1] + 1:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


class SpanCutter:
    """Cuts spans so that each piece is contiguous at both sides and small enough for one message."""

    def __init__(self, source_runs: Sequence[int], destination_runs: Sequence[int], max_blocks: int) -> None:
        if sum(source_runs) != sum(destination_runs) or max_blocks < 1:
            raise InternalError(
                f"Block tables differ: {sum(source_runs)} blocks at the source, {sum(destination_runs)} granted."
            )
        self.blocks = sum(source_runs)
        self._starts = _starts(source_runs) | _starts(destination_runs)
        self._max_blocks = max_blocks

    def cut(self, span: Span) -> Iterator[Span]:
        start = span.first_block
        for ordinal in range(span.first_block + 1, span.end_block):
            if ordinal in self._starts or ordinal - start == self._max_blocks:
                yield Span(span.layer, start, ordinal - start)
                start = ordinal
        yield Span(span.layer, start, span.end_block - start)


def _starts(runs: Sequence[int]) -> set[int]:
    starts: set[int] = set()
    position = 0
    for run in runs:
        starts.add(position)
        position += run
    return starts


class PendingSpans:
    """What is ready but not announced yet, in order of readiness; adjacent spans of a layer merge while they wait."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._blocks = 0

    def __bool__(self) -> bool:
        return bool(self._spans)

    def add(self, span: Span) -> None:
        self._blocks += span.block_count
        last = self._spans[-1] if self._spans else None
        if last is not None and last.layer == span.layer and last.end_block == span.first_block:
            self._spans[-1] = Span(span.layer, last.first_block, last.block_count + span.block_count)
        else:
            self._spans.append(span)

    def pop(self) -> Span:
        span = self._spans.popleft()
        self._blocks -= span.block_count
        return span

    def urgent(self, end_block: int, many_blocks: int) -> bool:
        """True where the prompt's last block, `end_block` - 1, is among them, so that little more comes; or they are many."""
        return self._blocks >= many_blocks or any(span.end_block >= end_block for span in self._spans)


class Coverage:
    """Which (layer, block) of a hand-off were seen: each exactly once, blocks [first_block, end_block) of every layer."""

    def __init__(self, layers: int, first_block: int, end_block: int) -> None:
        self._first_block = first_block
        self._end_block = end_block
        self._seen = [0] * layers  # one bit per block
        self._missing = layers * (end_block - first_block)

    @property
    def complete(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> int:
        return self._missing

    def problem(self, span: Span) -> str | None:
        """Why `span` may not be added; None where it may."""
        if not 0 <= span.layer < len(self._seen):
            return f"layer {span.layer} does not exist ({len(self._seen)} layers)"
        if not (self._first_block <= span.first_block < span.end_block <= self._end_block):
            return (
                f"blocks {span.first_block}..{span.end_block - 1} are outside of "
                f"{self._first_block}..{self._end_block - 1}, which were granted"
            )
        if self._seen[span.layer] & self._mask(span):
            return f"blocks {span.first_block}..{span.end_block - 1} of layer {span.layer} came before"
        return None

    def add(self, span: Span) -> None:
        """`span` has no problem."""
        self._seen[span.layer] |= self._mask(span)
        self._missing -= span.block_count

    @staticmethod
    def _mask(span: Span) -> int:
        return ((1 << span.block_count) - 1) << span.first_block
