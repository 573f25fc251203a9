"""The schedule, driven by simulated steps: budgets, order, preemption, and that every request ends."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest

from engine.block_tables import BlockTables, Table
from engine.pool import BlockPool
from engine.prefix_index import KeyChain
from engine.protocol import SetPolicy, Work
from engine.schedule import Schedule, StepPlan
from engine.sequences import DispatchState, Mode, Sequence
from kv_transfer.keys import chain_hashes
from tests.engine.rig import sampling, work

POLICY = SetPolicy(token_budget=64, max_running=8, prefill_chunk=32, decode_headroom_blocks=0)


@dataclass(slots=True)
class Driver:
    """Plays the engine: "computes" plans, draws made-up tokens, ends sequences at their max_tokens."""

    schedule: Schedule
    tables: BlockTables
    arrivals: int = 0
    order: list[int] = field(default_factory=list)  # request keys as they were admitted
    ended: list[int] = field(default_factory=list)
    sources: list[Table] = field(default_factory=list)  # of finished prefills, until a peer has read them

    def submit(self, one: Work, mode: Mode = "generate") -> Sequence:
        self.arrivals += 1
        state = DispatchState(one, mode, "active", self.arrivals, 0.0, set(one.choices))
        tokens = array("i", one.token_ids)
        sequence = Sequence(state, one.choices, tokens, KeyChain(16, one.block_hashes, 3))
        self.schedule.submit(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.schedule.plan()
        for sequence in plan.admitted:
            if not sequence.state.started:
                sequence.state.started_s = 0.0
                self.order.append(sequence.state.dispatch.request_key)
        for part in plan.parts:
            sequence = part.sequence
            assert sequence.table is not None, "a preempted sequence must not stay in the plan"
            assert part.count <= sequence.missing
            assert len(sequence.table.blocks) * 16 >= sequence.computed + part.count
            sequence.computed += part.count
            self.tables.store(sequence.table, sequence.tokens, sequence.computed)
            if not sequence.missing:
                self._draw(sequence)
        for sequence in plan.failed:
            self.schedule.remove(sequence)
        running = [sequence.table for sequence in self.schedule.running if sequence.table is not None]
        assert self.tables.leaked([*running, *self.sources]) == 0
        return plan

    def _draw(self, sequence: Sequence) -> None:
        if sequence.state.mode == "prefill":
            self.sources.append(self.schedule.withdraw(sequence))
        elif sequence.output_index + 1 >= sequence.state.work.sampling.max_tokens:
            self.schedule.remove(sequence)
            self.ended.append(sequence.state.dispatch.request_key)
        else:
            sequence.tokens.append(7)

    def run(self, steps: int = 10_000) -> int:
        for count in range(steps):
            if not self.schedule.running and not self.schedule.waiting:
                return count
            self.step()
        raise AssertionError("it never ends")


def driver(blocks: int = 64, policy: SetPolicy = POLICY, *, prefix_reuse: bool = True) -> Driver:
    tables = BlockTables(BlockPool(blocks), 16)
    return Driver(Schedule(tables, policy, prefix_reuse=prefix_reuse), tables)


def prompt(key: int, length: int) -> list[int]:
    return [key * 1000 + position for position in range(length)]


def test_decodes_come_first_and_chunks_fill_what_is_left_of_the_budget() -> None:
    one = driver()
    for key in (1, 2):
        one.submit(work(key, prompt(key, 4), sampling(20)))
    one.step()
    one.submit(work(3, prompt(3, 200)))
    plan = one.step()
    assert [(part.sequence.state.dispatch.request_key, part.count) for part in plan.parts] == [(1, 1), (2, 1), (3, 32)]


def test_unchunked_prompts_run_whole_and_one_may_exceed_the_budget() -> None:
    one = driver(policy=SetPolicy(64, 8, 0, 0))
    one.submit(work(1, prompt(1, 300)))
    one.submit(work(2, prompt(2, 40)))
    assert [part.count for part in one.step().parts] == [300]
    assert [part.count for part in one.step().parts] == [1, 40]


def test_requests_are_admitted_by_priority_then_arrival_and_a_large_one_is_not_overtaken() -> None:
    one = driver(blocks=8)
    one.submit(work(1, prompt(1, 100), sampling(5)))
    one.step()
    one.submit(work(2, prompt(2, 90)))
    one.submit(work(3, prompt(3, 4)))
    one.submit(work(4, prompt(4, 4), priority=-1))
    one.run()
    assert one.order == [1, 4, 2, 3]


def test_the_youngest_is_preempted_never_the_oldest_and_comes_back_before_new_work() -> None:
    one = driver(blocks=6)
    oldest = one.submit(work(1, prompt(1, 30), sampling(40)))
    youngest = one.submit(work(2, prompt(2, 30), sampling(40)))
    while not (plan := one.step()).preempted:
        assert youngest.table is not None
    assert plan.preempted == [youngest]
    assert oldest.table is not None
    new = one.submit(work(3, prompt(3, 30), sampling(2)))
    while youngest.table is None:
        assert new.table is None
        one.step()
    one.run()
    assert sorted(one.ended) == [1, 2, 3]
    assert one.schedule.preemptions == 1


def test_what_a_peer_may_read_is_never_preempted() -> None:
    one = driver(blocks=4)
    decoding = one.submit(work(1, prompt(1, 10), sampling(30)))
    prefilling = one.submit(work(2, prompt(2, 40)), "prefill")
    for _ in range(12):
        assert not one.step().preempted
    assert decoding.table is not None
    assert prefilling.table is None
    assert len(one.sources) == 1
    assert decoding.missing == 1  # it waits for a block, and for the peer
    one.tables.close(one.sources.pop())
    one.run()
    assert one.ended == [1]


def test_a_request_that_outgrows_the_whole_pool_fails_instead_of_waiting_for_ever() -> None:
    one = driver(blocks=2)
    one.submit(work(1, prompt(1, 20), sampling(50)))
    failed = [sequence for _ in range(40) for sequence in one.step().failed]
    assert [sequence.state.dispatch.request_key for sequence in failed] == [1]
    assert one.tables.pool.available == 2


def test_new_prompts_leave_the_head_room_of_those_that_decode() -> None:
    one = driver(blocks=10, policy=SetPolicy(64, 8, 32, 3))
    one.submit(work(1, prompt(1, 16), sampling(10)))
    one.step()
    blocked = one.submit(work(2, prompt(2, 16 * 7)))
    one.step()
    assert blocked.table is None
    one.run()
    assert one.order == [1, 2]


def test_choices_count_against_the_largest_batch() -> None:
    one = driver(policy=SetPolicy(64, 4, 32, 0))
    one.submit(work(1, prompt(1, 8), sampling(6), choices=(0, 1, 2)))
    second = one.submit(work(2, prompt(2, 8), sampling(6), choices=(0, 1)))
    one.step()
    assert second.table is None


def test_prompt_logprobs_turn_reuse_off() -> None:
    one = driver()
    one.submit(work(1, prompt(1, 64), sampling(1)))
    one.run()
    again = one.submit(work(2, prompt(1, 64), sampling(1, prompt_logprobs=1)))
    assert one.schedule.reuse_limit(again) == 0
    one.step()
    assert again.computed == 32


@pytest.mark.parametrize("seed", range(40))
def test_under_any_load_every_request_ends_and_no_budget_is_exceeded(seed: int) -> None:
    rng = random.Random(seed)
    policy = SetPolicy(rng.choice([16, 64]), rng.choice([2, 8]), rng.choice([0, 16, 48]), rng.choice([0, 2]))
    one = driver(rng.choice([12, 20, 60]), policy, prefix_reuse=rng.random() < 0.7)
    keys = range(1, 25)
    for key in keys:
        length = rng.choice([1, 15, 16, 17, 60, 100])
        drawn = sampling(rng.choice([1, 5, 40]))
        assert length + drawn.max_tokens < 12 * 16
        one.submit(work(key, prompt(rng.choice([0, key]), length), drawn, priority=rng.choice([0, 0, 1])))
        for _ in range(rng.randrange(3)):
            plan = one.step()
            counts = sorted(part.count for part in plan.parts)
            # Unchunked, one prompt may exceed what is left: it could never run otherwise.
            assert sum(counts) <= policy.token_budget or (
                not policy.prefill_chunk and sum(counts[:-1]) < policy.token_budget
            )
            assert not plan.failed
    one.run()
    assert sorted(one.ended) == list(keys)
    assert one.tables.pool.available == one.tables.pool.size


def test_keys_of_a_work_are_those_of_its_tokens() -> None:
    one = work(1, prompt(1, 40))
    assert one.block_hashes == chain_hashes(bytes(32), one.token_ids)
