"""Owns what the receiver and the owner of the destination blocks say to each other: reservations, reports, Destination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.leases import DispatchKey
from pdserve.errors import InternalError, PdserveError


@dataclass(frozen=True, slots=True)
class Reservation:
    """Destination blocks of one dispatch, in block-table order, as the engine reserved them (`engine.protocol.Reserved`)."""

    dispatch: DispatchKey
    blocks: tuple[int, ...]
    generations: tuple[int, ...]  # owner number of each block, raised at each reuse
    cached_tokens: int  # the blocks of these are shared and must not be written
    token_count: int


@dataclass(frozen=True, slots=True)
class ReceivedReport:
    """What came. transfer_us: first announcement to last verified block."""

    transport: str
    bytes: int
    segments: int
    transfer_us: int


class Destination(Protocol):
    """Owner of the destination blocks. Exactly one of the two is called per reservation, once, on the event loop."""

    def activate(
        self, dispatch: DispatchKey, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport
    ) -> None:
        """All KV is verified and no writer is left: the request may run. first_tokens: (choice, token id)."""

    def writer_done(self, dispatch: DispatchKey, error: PdserveError | None) -> None:
        """No writer can touch the blocks any more, and the request must not run. None: the sender gave it back."""


@dataclass(slots=True)
class ReceiverCounters:
    """Since start; read by LoadReport."""

    verify_failures: int = 0
    expired_leases: int = 0


class FencedBlocks:
    """Which blocks a live writer may write, with their generation: the check that the pool reuses none of them."""

    def __init__(self) -> None:
        self._generations: dict[int, int] = {}

    def fence(self, blocks: Sequence[int], generations: Sequence[int]) -> None:
        """Raises InternalError where a block still has a writer: its pool gave it away before WriterDone."""
        for block, generation in zip(blocks, generations, strict=True):
            held = self._generations.get(block)
            if held is not None:
                raise InternalError(
                    f"KV block {block} was reserved as generation {generation} while a writer of generation {held} lives."
                )
        self._generations.update(zip(blocks, generations, strict=True))

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._generations[block]

    def __len__(self) -> int:
        return len(self._generations)
