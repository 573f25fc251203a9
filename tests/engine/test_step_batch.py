"""Buffers that persist over steps: what they hold is what a step built anew would be given, whatever came before it.

Sequences come, go, grow, are preempted, forked and copied on write as the engine's own schedule and desk do it.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_tables import Table
from engine.kernel_attention import KernelAttention
from engine.kernels.library import AttentionTasks, Kernels
from engine.prefix_index import KeyChain
from engine.protocol import SetPolicy
from engine.schedule import Part
from engine.sequences import DispatchState, Sequence
from engine.step_batch import StepBatch, StepBuffers
from tests.engine.rig import work
from tests.engine.test_schedule_storms import PAGE, Storm

CPU = torch.device("cpu")
CHUNK, WINDOWS = 48, (0, 70)
PLANNED = [
    "begins",
    "ends",
    "task_rows",
    "task_counts",
    "task_chunks",
    "task_slots",
    "rows",
    "slots",
    "merged_rows",
    "merged_starts",
]


class SmallChunks(Kernels):
    """Plans are made with it; nothing is computed."""

    def __init__(self) -> None:
        self.chunk = CHUNK


def attention() -> KernelAttention:
    return KernelAttention(torch.zeros(2, 1, 2, PAGE, 2, 16), SmallChunks(), WINDOWS, share=True)


def assert_as_built_anew(batch: StepBatch, parts: list[Part]) -> None:
    ordered = sorted(parts, key=lambda part: part.count > 1)
    assert list(batch.parts) == ordered
    rows = [
        (part.sequence, position)
        for part in ordered
        for position in range(part.sequence.computed, part.sequence.computed + part.count)
    ]
    assert [rows[start] for start in batch.starts] == [(part.sequence, part.sequence.computed) for part in ordered]
    assert [batch.last_row(i) + 1 for i in range(len(ordered))] == [*batch.starts[1:], len(rows)]
    assert batch.token_ids.tolist() == [sequence.tokens[position] for sequence, position in rows]
    assert batch.positions.tolist() == [position for _, position in rows]
    slots = [table_of(sequence).blocks[at // PAGE] * PAGE + at % PAGE for sequence, at in rows]
    assert batch.slots.tolist() == slots
    assert batch.highest_position == max(position for _, position in rows)
    for ordinal, part in enumerate(ordered):
        pages = -(-(part.sequence.computed + part.count) // PAGE)
        assert batch.blocks.of(ordinal)[:pages].tolist() == table_of(part.sequence).blocks[:pages].tolist()


def assert_same_tasks(got: AttentionTasks, wanted: AttentionTasks) -> None:
    for name in PLANNED:
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for task, (first, end) in enumerate(wanted.task_chunks.view(-1, 2).tolist()):
        row = wanted.rows[wanted.task_rows[task] + wanted.task_counts[task] - 1]
        pages = slice(first * CHUNK // PAGE, -(-min(end * CHUNK, int(wanted.ends[row])) // PAGE))
        read = [tasks.blocks.view(-1)[int(tasks.task_blocks[task]) :][pages] for tasks in (got, wanted)]
        assert torch.equal(*read)


def table_of(sequence: Sequence) -> Table:
    assert sequence.table is not None
    return sequence.table


@dataclass(slots=True)
class ComputedStorm(Storm):
    """Checks the inputs of every step."""

    buffers: StepBuffers = field(default_factory=lambda: StepBuffers(PAGE, CPU))
    attention: KernelAttention = field(default_factory=attention)

    def compute(self, parts: list[Part]) -> None:
        if not parts:
            return
        batch = self.buffers.build(parts)
        assert_as_built_anew(batch, parts)
        fresh = attention().step(StepBuffers(PAGE, CPU).build(parts))._calls
        for got, wanted in zip(self.attention.step(batch)._calls, fresh, strict=True):
            assert_same_tasks(got.tasks, wanted.tasks)


def storm(seed: int) -> ComputedStorm:
    rng = random.Random(seed)
    policy = SetPolicy(
        rng.choice([16, 64, 200]), rng.choice([1, 4, 16]), rng.choice([0, 8, 16, 48]), rng.choice([0, 2, 6])
    )
    return ComputedStorm(rng, rng.choice([14, 24, 64, 200]), policy)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_in_a_storm_every_step_computes_with_what_a_new_one_would_be_given(seed: int) -> None:
    one = storm(seed)
    for key in range(1, 16):
        one.submit(key)
        for _ in range(one.rng.randrange(8)):
            one.step()
            one.peers(0.3)
            if one.rng.random() < 0.1:
                one.cancel_one()
    for _ in range(2_000):
        if not one.desk.states:
            break
        one.step()
        one.peers(1.0)
    assert not one.desk.states


def decoding(key: int, computed: int) -> Sequence:
    tokens = array("i", range(key, key + computed + 1))
    state = DispatchState(work(key, [1, 2]), "generate", "active", key, 0.0, {0})
    chain = KeyChain(PAGE, b"", 0)
    blocks = array("i", range(1000 * key, 1000 * key + computed // PAGE + 1))
    return Sequence(state, (0,), tokens, chain, Table(blocks, chain), computed)


def go_on(sequence: Sequence) -> None:
    sequence.computed += 1
    sequence.tokens.append(7 + sequence.computed)
    if sequence.computed % PAGE == 0:
        table_of(sequence).blocks.append(5000 + sequence.computed)


def test_steps_over_the_same_sequences_keep_their_memory_and_plans_hold_until_a_chunk_ends() -> None:
    sequences, buffers, planner = [decoding(key, 3 * key) for key in (1, 2, 3)], StepBuffers(PAGE, CPU), attention()
    blocks, planned = [], []
    for _ in range(2 * CHUNK):
        parts = [Part(sequence, 1) for sequence in sequences]
        batch = buffers.build(parts)
        assert_as_built_anew(batch, parts)
        blocks.append(batch.blocks)
        planned.append(planner.step(batch)._calls)
        for sequence in sequences:
            go_on(sequence)
    assert all(one is blocks[0] for one in blocks)
    made = sum(one is not other for one, other in pairwise(planned))
    assert made <= 3 * 2 * 2, "more often than a row comes to a chunk or leaves one behind"


def test_lines_grow_with_the_longest_sequence_and_with_their_number() -> None:
    buffers, sequences = StepBuffers(PAGE, CPU), [decoding(1, 5)]
    for key in range(2, 40):
        sequences.append(decoding(key, PAGE * 64 - 3 if key == 30 else key))
        for _ in range(5):  # a sequence comes to a page that its line had no room for
            parts = [Part(sequence, 1) for sequence in sequences]
            assert_as_built_anew(buffers.build(parts), parts)
            for sequence in sequences:
                go_on(sequence)


def test_a_block_that_a_copy_replaced_is_found_in_the_next_step_and_after_a_pause() -> None:
    buffers, one, other = StepBuffers(PAGE, CPU), decoding(1, 20), decoding(2, 40)
    for paused in (False, True):
        parts = [Part(one, 1), Part(other, 1)]
        assert_as_built_anew(buffers.build(parts), parts)
        for sequence in (one, other):
            go_on(sequence)
            table_of(sequence).blocks[sequence.computed // PAGE] += 100_000
        if paused:
            assert_as_built_anew(buffers.build(parts[1:]), parts[1:])
        assert_as_built_anew(buffers.build(parts), parts)


def test_a_chunk_of_a_prompt_follows_another_of_the_same_size() -> None:
    buffers, one = StepBuffers(PAGE, CPU), decoding(1, 90)
    for one.computed in (10, 30, 50):
        parts = [Part(one, 20)]
        assert_as_built_anew(buffers.build(parts), parts)
    assert np.array_equal(buffers.build([Part(one, 1)]).positions, [50])
