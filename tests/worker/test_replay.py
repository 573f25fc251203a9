"""The replay buffer against a model of it: nothing lost, nothing twice, bounded."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker_runtime.replay import ReplayBuffer, ReplayOverflow

LIMIT_BYTES = 200


class ReplayModel(RuleBasedStateMachine):
    """A controller that reads, loses its stream, reconnects and acknowledges as it likes must see 1, 2, 3, ... once each."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReplayBuffer[int](LIMIT_BYTES)
        self.issued = 0
        self.cursor = 0  # of the stream
        self.seen: list[int] = []
        self.acknowledged = 0

    @rule(size=st.integers(1, 60))
    def append(self, size: int) -> None:
        if self.buffer.size_bytes + size > LIMIT_BYTES:
            with pytest.raises(ReplayOverflow):
                self.buffer.append(self.issued + 1, size)
            return
        self.issued += 1
        assert self.buffer.append(self.issued, size) == self.issued

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        for _ in range(count):
            entry = self.buffer.after(self.cursor)
            if entry is None:
                assert self.cursor == self.issued
                return
            assert entry.sequence == self.cursor + 1 == entry.item
            self.cursor = entry.sequence
            if entry.sequence > len(self.seen):
                self.seen.append(entry.item)

    @rule()
    def reconnect(self) -> None:
        self.cursor = self.buffer.acknowledged

    @rule(back=st.integers(0, 10))
    def acknowledge(self, back: int) -> None:
        sequence = max(0, len(self.seen) - back)
        self.buffer.acknowledge(sequence)
        self.acknowledged = max(self.acknowledged, sequence)
        self.cursor = max(self.cursor, self.acknowledged)

    @rule(ahead=st.integers(1, 10))
    def acknowledge_what_was_never_issued(self, ahead: int) -> None:
        self.buffer.acknowledge(self.issued + ahead)

    @invariant()
    def nothing_is_lost_or_kept_too_long(self) -> None:
        assert self.seen == list(range(1, len(self.seen) + 1))
        assert self.buffer.acknowledged == self.acknowledged
        assert self.buffer.size_bytes <= LIMIT_BYTES
        if self.acknowledged == self.issued:
            assert self.buffer.size_bytes == 0


TestReplay = ReplayModel.TestCase
TestReplay.settings = settings(max_examples=100, stateful_step_count=40)
