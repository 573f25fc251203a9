"""Desk, schedule and block tables under storms, with the content of every block kept beside them.

The played engine "computes" by writing, into each place of a block, a digest of all tokens up to that place, and reads all of
it back before each step: a block given away too early, a lost copy or a stale hit of the index shows as a wrong digest.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest

from engine.block_tables import BlockTables, Table
from engine.dispatch_desk import DispatchDesk
from engine.pool import BlockPool
from engine.protocol import (
    Activate,
    Cancel,
    Dispatch,
    Freed,
    ReserveBlocks,
    ReserveRefused,
    SetPolicy,
    Submit,
    WorkFailed,
)
from engine.refusals import Doorkeeper
from engine.schedule import Part, Schedule, StepPlan
from engine.sequences import DispatchState, Sequence
from pdserve.errors import NoCapacity
from tests.engine.rig import Recorder, sampling, work

PAGE = 16
LONGEST = 190  # tokens of a request with its output: twelve blocks


@dataclass(slots=True)
class Storm:
    rng: random.Random
    blocks: int
    policy: SetPolicy
    sink: Recorder = field(default_factory=Recorder)
    now_s: float = 0.0
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, place) -> digest of the tokens up to it
    submitted: set[Dispatch] = field(default_factory=set)
    cancelled: set[Dispatch] = field(default_factory=set)
    tables: BlockTables = field(init=False)
    schedule: Schedule = field(init=False)
    desk: DispatchDesk = field(init=False)

    def __post_init__(self) -> None:
        self.tables = BlockTables(BlockPool(self.blocks), PAGE)
        self.schedule = Schedule(self.tables, self.policy, prefix_reuse=self.rng.random() < 0.8)
        keeper = Doorkeeper(4096, PAGE, self.blocks, 1 << 20)
        self.desk = DispatchDesk(self.tables, self.schedule, keeper, self.sink, lambda: self.now_s, 5)

    # ---- content

    def write(self, table: Table, tokens: array[int], first: int, end: int) -> None:
        digests = _digests(tokens)
        for position in range(first, end):
            self.places[table.blocks[position // PAGE], position % PAGE] = digests[position]

    def check(self, table: Table, tokens: array[int], end: int) -> None:
        digests = _digests(tokens)
        for position in range(end):
            assert self.places[table.blocks[position // PAGE], position % PAGE] == digests[position]

    # ---- the engine

    def compute(self, parts: list[Part]) -> None:
        """What other tests check in every step."""

    def step(self) -> StepPlan:
        oldest = min((one for one in self.schedule.running if one.preemptable), key=lambda one: one.age, default=None)
        plan = self.schedule.plan()
        assert oldest is None or oldest not in plan.preempted
        self._check_budget(plan)
        for sequence in plan.failed:
            self.desk.fail(sequence, NoCapacity("alone too large"))
        for sequence in plan.admitted:
            if not sequence.state.started:
                sequence.state.started_s = self.now_s
        for copy in plan.copies:
            for place in range(PAGE):
                if (copy.source, place) in self.places:
                    self.places[copy.target, place] = self.places[copy.source, place]
        self.compute(plan.parts)
        for part in plan.parts:
            assert part.sequence.table is not None, "a preempted sequence must not stay in the plan"
            self.check(part.sequence.table, part.sequence.tokens, part.sequence.computed)
        for part in plan.parts:
            sequence = part.sequence
            assert sequence.table is not None
            assert 0 < part.count <= sequence.missing
            end = sequence.computed + part.count
            touched = sequence.table.blocks[sequence.computed // PAGE : -(-end // PAGE)]
            assert all(self.tables.pool.references(block) == 1 for block in touched), "a shared block is written"
            self.write(sequence.table, sequence.tokens, sequence.computed, end)
            if sequence.state.mode == "prefill":
                sequence.announced = -(-end // PAGE)
        for part in plan.parts:
            self._advance(part.sequence, part.count)
        self.audit()
        return plan

    def _check_budget(self, plan: StepPlan) -> None:
        counts = [part.count for part in plan.parts]
        assert len({part.sequence for part in plan.parts}) == len(counts), "twice in one step"
        if sum(counts) > self.policy.token_budget:
            assert not self.policy.prefill_chunk
            assert sum(counts) - max(counts) < self.policy.token_budget
        decodes = [part.sequence.decodes for part in plan.parts]
        assert sum(one.forked and one.missing == 1 for one in (part.sequence for part in plan.parts)) <= max(
            self.policy.max_running, sum(decodes)
        )

    def _advance(self, sequence: Sequence, count: int) -> None:
        assert sequence.table is not None
        sequence.computed += count
        self.tables.store(sequence.table, sequence.tokens, sequence.computed)
        if sequence.missing:
            return
        last = sequence.output_index + 1 >= sequence.state.work.sampling.max_tokens
        going_on = {} if last else {choice: 100_000 + choice for choice in sequence.choices if self.rng.random() < 0.97}
        if not sequence.forked:
            self.desk.prompt_done(sequence, going_on)
        elif going_on:
            sequence.tokens.append(going_on[sequence.choices[0]])
        else:
            self.desk.end_choices(sequence.state, sequence.choices)

    def audit(self) -> None:
        assert self.tables.leaked(self.desk.held_tables()) == 0
        for state in self.desk.states.values():
            if state.phase == "source" and state.table is not None:
                self.check(state.table, array("i", state.work.token_ids), min(len(state.table.blocks), 1))

    # ---- the peers

    def submit(self, key: int) -> None:
        length = self.rng.choice([1, 2, 15, 16, 17, 33, 64, 100])
        drawn = sampling(self.rng.choice([1, 2, 10, 40]))
        assert length + drawn.max_tokens < LONGEST
        choices = tuple(range(self.rng.choice([1, 1, 1, 2, 4])))
        prefix = self.rng.choice([1, 2, key + 10])
        one = work(
            key, [prefix * 500 + n for n in range(length)], drawn, choices=choices, priority=self.rng.choice([0, 0, 1])
        )
        self.submitted.add(one.dispatch)
        kind = self.rng.choice(["generate", "generate", "prefill", "reserve"])
        if kind == "reserve":
            self.desk.reserve(ReserveBlocks(one, 10_000))
        else:
            self.desk.submit(Submit(one, "prefill" if kind == "prefill" else "generate"))

    def peers(self, likely: float) -> None:
        """Writers write, commit or die; readers release."""
        for state in list(self.desk.states.values()):
            if state.phase in ("reserved", "ending"):
                self._receive(state)
                if self.rng.random() < likely:
                    self._end_writer(state)
            elif state.mode == "prefill" and state.phase == "source" and self.rng.random() < likely:
                self.desk.peer_done(state.dispatch)

    def _receive(self, state: DispatchState) -> None:
        assert state.table is not None
        tokens = array("i", state.work.token_ids)
        self.write(state.table, tokens, state.table.stored * PAGE, len(tokens))

    def _end_writer(self, state: DispatchState) -> None:
        if self.rng.random() < 0.2:
            self.desk.cancel(Cancel(state.dispatch))
            self.desk.peer_done(state.dispatch)
        else:
            first = tuple((choice, 100_000 + choice) for choice in sorted(state.choices))
            last = state.work.sampling.max_tokens == 1
            self.desk.activate(Activate(state.dispatch, () if last else first), lambda blocks: None)

    def cancel_one(self) -> None:
        if not self.desk.states:
            return
        state = self.rng.choice(list(self.desk.states.values()))
        choices = tuple(choice for choice in state.choices if self.rng.random() < 0.5)
        if not choices:
            self.cancelled.add(state.dispatch)
        self.desk.cancel(Cancel(state.dispatch, choices))


def _digests(tokens: array[int]) -> list[int]:
    digests: list[int] = []
    digest = 0
    for token in tokens:
        digest = hash((digest, token))
        digests.append(digest)
    return digests


def storm(seed: int) -> Storm:
    rng = random.Random(seed)
    chunk = rng.choice([0, 8, 16, 48])
    policy = SetPolicy(rng.choice([1, 16, 64]), rng.choice([1, 4, 16]), chunk, rng.choice([0, 2, 6]))
    return Storm(rng, rng.choice([12, 14, 24, 64]), policy)


@pytest.mark.parametrize("seed", range(60))
def test_in_a_storm_every_dispatch_ends_no_block_leaks_and_every_token_sees_its_own_past(seed: int) -> None:
    one = storm(seed)
    for key in range(1, 40):
        one.submit(key)
        for _ in range(one.rng.randrange(4)):
            one.step()
            one.peers(0.3)
            if one.rng.random() < 0.1:
                one.cancel_one()
                one.audit()
    for _ in range(20_000):
        if not one.desk.states:
            break
        one.step()
        one.peers(1.0)
    assert not one.desk.states, "it never ends"
    assert not one.schedule.running
    assert not one.schedule.waiting
    assert one.tables.pool.available == one.tables.pool.size
    freed = [event.dispatch for event in one.sink.of(Freed)]
    refused = [event.dispatch for event in one.sink.of(ReserveRefused)]
    assert len(freed) == len(set(freed)), "freed twice"
    assert set(freed) | set(refused) == one.submitted
    assert not one.sink.of(WorkFailed)
