"""The cut of attention into tasks: every row reads every chunk of its keys once, and shares only equal blocks."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.attention_plan import MOST_SHARED_ROWS, Cut, Reader, plan

CHUNK, PAGE = 64, 16
PAGES = CHUNK // PAGE


def forest(source: random.Random, size: int) -> list[Reader]:
    readers, start, fresh = list[Reader](), 0, iter(range(10**6))
    trunks = [[next(fresh) for _ in range(PAGES * source.randrange(4))] for _ in range(2)]
    for _ in range(size):
        table = list(source.choice(trunks))
        if readers and source.random() < 0.5:
            other = source.choice(readers)
            table = list(other.blocks[: other.first // PAGE])
        count = source.choice([1, 1, 1, 3, MOST_SHARED_ROWS, MOST_SHARED_ROWS + 1, 200])
        first = len(table) * PAGE + source.randrange(3 * CHUNK)
        table += [next(fresh) for _ in range(-(-(first + count) // PAGE) - len(table))]
        readers.append(Reader(start, count, first, np.array(table, dtype=np.int32)))
        start += count
    return readers


@given(
    st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([1, 8, 100]), st.sampled_from([0, 1, 90]), st.booleans()
)
def test_every_row_reads_every_chunk_that_it_sees_once_and_in_order(
    seed: int, size: int, units: int, window: int, share: bool
) -> None:
    readers = forest(random.Random(seed), size)
    tasks = plan(readers, Cut(CHUNK, PAGE, window, units, share))
    read: dict[int, list[int]] = {}
    for rows, (begin, end) in sorted(zip(tasks.rows, tasks.chunks, strict=True), key=lambda task: task[1]):
        for row in rows.tolist():
            read.setdefault(row, []).extend(range(begin, end))
    for reader in readers:
        for row in range(reader.count):
            position = reader.first + row
            first = max(0, position + 1 - window) // CHUNK if window else 0
            chunks = read.pop(reader.start + row)
            assert chunks == list(range(chunks[0], chunks[-1] + 1))
            assert chunks[0] <= first
            assert chunks[-1] >= position // CHUNK
    assert not read


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_rows_of_a_task_hold_the_same_blocks_and_see_all_their_keys(seed: int, size: int) -> None:
    readers = forest(random.Random(seed), size)
    tasks = plan(readers, Cut(CHUNK, PAGE))
    for members, (begin, end), merged in zip(tasks.members, tasks.chunks, tasks.merged, strict=True):
        if len(members) == 1:
            continue
        assert merged, "another task reads the rest of these rows"
        first = readers[members[0]].blocks[begin * PAGES : end * PAGES]
        for member in members:
            assert (readers[member].blocks[begin * PAGES : end * PAGES] == first).all()
            assert readers[member].first >= end * CHUNK
        assert begin == 0 or end == begin + 1, "what was merged before it may not be merged again in another order"


@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([1, 100]))
def test_a_row_writes_its_output_in_one_task_or_leaves_all_of_it_to_the_merge(seed: int, size: int, units: int) -> None:
    tasks = plan(forest(random.Random(seed), size), Cut(CHUNK, PAGE, units=units))
    direct = [row for rows, merged in zip(tasks.rows, tasks.merged, strict=True) if not merged for row in rows.tolist()]
    partial = {row for rows, merged in zip(tasks.rows, tasks.merged, strict=True) if merged for row in rows.tolist()}
    assert len(direct) == len(set(direct))
    assert partial.isdisjoint(direct)


def test_a_prefix_that_all_rows_share_is_one_task_for_all_of_them() -> None:
    shared = list(range(2 * PAGES))
    readers = [Reader(i, 1, 2 * CHUNK + 3, np.array([*shared, 100 + i], dtype=np.int32)) for i in range(8)]
    tasks = plan(readers, Cut(CHUNK, PAGE))
    assert next((len(rows), chunks) for rows, chunks in zip(tasks.rows, tasks.chunks, strict=True)) == (8, (0, 2))
    assert len(tasks.rows) == 9


def test_two_levels_of_a_tree_are_shared_each_by_its_own_rows() -> None:
    trunk, branches = list(range(PAGES)), [list(range(1000 + PAGES * b, 1000 + PAGES * (b + 1))) for b in range(2)]
    readers = [
        Reader(4 * b + i, 1, 2 * CHUNK, np.array([*trunk, *branches[b], 10_000 + 4 * b + i], dtype=np.int32))
        for b in range(2)
        for i in range(4)
    ]
    tasks = plan(readers, Cut(CHUNK, PAGE))
    shared = {
        (rows.tolist()[0], len(rows), chunks)
        for rows, chunks in zip(tasks.rows, tasks.chunks, strict=True)
        if len(rows) > 1
    }
    assert shared == {(0, 8, (0, 1)), (0, 4, (1, 2)), (4, 4, (1, 2))}
