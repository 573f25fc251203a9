"""Owns the composition of steps: decodes first, then prompts in chunks; admission, growth and preemption over the block tables.

Pure. The policy is Sarathi-Serve's (OSDI'24): a constant token budget per step that decodes fill first and chunks of prompts
after them. When blocks run out the youngest sequence is preempted and recomputed later, before new work; the oldest never.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.block_tables import BlockCopy, BlockTables, Table
from engine.protocol import SetPolicy
from engine.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Part:
    """`count` missing tokens of `sequence` are computed in this step."""

    sequence: Sequence
    count: int


@dataclass(slots=True)
class StepPlan:
    parts: list[Part] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)  # can never get the blocks they need

    @property
    def empty(self) -> bool:
        return not self.parts and not self.failed


class Schedule:
    """Waiting and running sequences, each in order of age. Running ones hold a table."""

    def __init__(self, tables: BlockTables, policy: SetPolicy, *, prefix_reuse: bool) -> None:
        self.policy = policy
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.flying: frozenset[Sequence] = frozenset()  # in the air, see engine.flight
        self._tables = tables
        self.prefix_reuse = prefix_reuse

    def submit(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_turn)

    def enter(self, sequence: Sequence) -> None:
        """Takes up a sequence that has its table: a fork, or one whose KV was handed over."""
        insort(self.running, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence wherever it is, and frees its blocks."""
        (self.waiting if sequence.table is None else self.running).remove(sequence)
        self.close(sequence)

    def withdraw(self, sequence: Sequence) -> Table:
        """Takes out a running sequence; its table goes to the caller."""
        assert sequence not in self.flying
        self.running.remove(sequence)
        table, sequence.table = sequence.table, None
        assert table is not None
        return table

    def close(self, sequence: Sequence) -> None:
        assert sequence not in self.flying
        if sequence.table is not None:
            self._tables.close(sequence.table)
            sequence.table = None

    def reuse_limit(self, sequence: Sequence) -> int:
        """Tokens that may come from the index: the last one is always computed, its logits are needed."""
        if not self.prefix_reuse or sequence.state.work.sampling.prompt_logprobs is not None:
            return 0
        return len(sequence.tokens) - 1

    def owed_blocks(self) -> int:
        """Blocks that preempted sequences need to come back: they go before new reservations."""
        return sum(self._tables.pages_for(len(seq.tokens)) for seq in self.waiting if seq.state.started)

    def plan(self) -> StepPlan:
        """The next step. Moves sequences between waiting and running; the caller computes the parts. While prompts are in the
        air decodes only."""
        plan = StepPlan()
        budget = self._plan_decodes(plan)
        if not self.flying:
            budget = self._plan_running_prompts(plan, budget)
            self._admit(plan, budget)
        return plan

    # ---- decodes

    def _plan_decodes(self, plan: StepPlan) -> int:
        """Adds decodes, oldest first. Returns what is left of the token budget."""
        budget = self.policy.token_budget
        decoding = [sequence for sequence in self.running if sequence.decodes][: self.policy.max_running]
        for sequence in decoding:
            if budget and sequence.table is not None and self._grow(sequence, plan):
                plan.parts.append(Part(sequence, 1))
                budget -= 1
        return budget

    def _grow(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Makes room for the next token of `sequence`, preempting younger ones. False: not in this step."""
        assert sequence.table is not None
        position = sequence.computed
        if self._tables.has_room(sequence.table, position):
            return True
        while not self._tables.pool.available:
            victim = self._victim(sequence)
            if victim is None:
                if self._tables.pool.held == len(sequence.table.blocks):
                    plan.failed.append(sequence)  # it has the whole pool to itself
                return False
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        copy = self._tables.make_room(sequence.table, position)
        if copy is not None:
            plan.copies.append(copy)
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The youngest that may go, `sequence` itself included; None if that would be the oldest, or is in the air: it is waited
        for, no older one goes in its place."""
        candidates = [other for other in self.running if other.preemptable]
        if not candidates or candidates[-1] is candidates[0] or candidates[-1].age < sequence.age:
            return None
        return None if candidates[-1] in self.flying else candidates[-1]

    def _preempt(self, victim: Sequence, plan: StepPlan) -> None:
        self.running.remove(victim)
        self.close(victim)
        victim.computed = 0
        victim.blends = victim.state.work.blend is not None  # as before, or it would go on with other tokens
        victim.prompt_rows.clear()
        self.preemptions += 1
        plan.preempted.append(victim)
        self.submit(victim)

    # ---- prompts

    def _plan_running_prompts(self, plan: StepPlan, budget: int) -> int:
        for sequence in self._prompts():
            count = self._chunk(sequence, budget, first=_has_no_prompt(plan))
            if not count:
                return 0
            plan.parts.append(Part(sequence, count))
            budget -= count
        return max(budget, 0)

    def _prompts(self) -> Iterator[Sequence]:
        return (sequence for sequence in self.running if not sequence.decodes and not sequence.blends)

    def _chunk(self, sequence: Sequence, budget: int, *, first: bool) -> int:
        """Tokens of a prompt in this step. Unchunked, the first prompt may exceed the budget: it could never run otherwise."""
        if self.policy.prefill_chunk:
            return min(sequence.missing, self.policy.prefill_chunk, max(budget, 0))
        return sequence.missing if sequence.missing <= budget or (first and budget > 0) else 0

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Admits in order; the first that does not fit stops it, so that a large prompt is not overtaken for ever."""
        choices = sum(len(sequence.choices) for sequence in self.running if sequence.preemptable)
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            generates = sequence.preemptable
            if generates and choices and choices + len(sequence.choices) > self.policy.max_running:
                return
            if not self.policy.prefill_chunk and sequence.missing > budget and not _has_no_prompt(plan):
                return
            if not self._open(sequence):
                return
            self.waiting.pop(0)
            self.enter(sequence)
            plan.admitted.append(sequence)
            choices += len(sequence.choices) if generates else 0
            if sequence.blends:
                continue  # `engine.blend_jobs` takes it up
            count = self._chunk(sequence, budget, first=_has_no_prompt(plan))
            if not count:
                return  # it holds its blocks and comes first in the next step
            plan.parts.append(Part(sequence, count))
            budget -= count

    def _open(self, sequence: Sequence) -> bool:
        """Gives `sequence` its blocks, with the head-room of those that decode left over."""
        limit = self.reuse_limit(sequence)
        spare = self.policy.decode_headroom_blocks if any(seq.decodes for seq in self.running) else 0
        table = self._tables.open(sequence.tokens, sequence.chain, limit, spare)
        if table is None:
            return False
        sequence.table = table
        sequence.computed = table.stored * self._tables.page_tokens
        self.prefix_queries += len(sequence.tokens) if limit else 0
        self.prefix_hits += sequence.computed
        return True


def _age(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.age


def _turn(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    """Order of admission: what was preempted comes before new work."""
    return (not sequence.state.started, sequence.age)


def _has_no_prompt(plan: StepPlan) -> bool:
    return all(part.sequence.decodes for part in plan.parts)
