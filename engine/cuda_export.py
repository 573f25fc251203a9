"""Owns the copies between the device's pool and the arena: beside the compute, announced in order once they have ended.

Never run on a GPU so far: tests cover everything but `CudaLane`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Event(Protocol):
    """Passed once all copies before it have ended. torch.cuda.Event is one."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Copy:
    target: torch.Tensor
    source: torch.Tensor


class CopyLane(Protocol):
    def copy(self, copies: Sequence[Copy]) -> Event:
        """Begins the copies, in order, after what the compute was given so far and after earlier copies; does not wait."""


class Exports:
    """What is on its way: events with what to announce after them, oldest first."""

    def __init__(self) -> None:
        self._outstanding: deque[tuple[Event, Callable[[], None]]] = deque()

    def __len__(self) -> int:
        return len(self._outstanding)

    def add(self, event: Event, announce: Callable[[], None]) -> None:
        self._outstanding.append((event, announce))

    def announce_ended(self) -> None:
        """Those that ended, up to the first that has not; waits for none."""
        while self._outstanding and self._outstanding[0][0].query():
            self._outstanding.popleft()[1]()

    def settle(self) -> None:
        """Waits for all of them and announces them."""
        while self._outstanding:
            event, announce = self._outstanding.popleft()
            event.synchronize()
            announce()

    def abandon(self) -> None:
        """Waits for all of them and announces none: nobody is left to hear it."""
        while self._outstanding:
            self._outstanding.popleft()[0].synchronize()


def runs(blocks: Sequence[int]) -> Iterator[slice]:
    """Neighbours that ascend by one become one slice, in the order of `blocks`."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1:
            yield slice(blocks[start], blocks[end - 1] + 1)
            start = end


class CudaLane:
    """Implements CopyLane with a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, copies: Sequence[Copy]) -> Event:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for each in copies:
                each.target.copy_(each.source, non_blocking=True)
            event: Event = self._stream.record_event()
        return event
