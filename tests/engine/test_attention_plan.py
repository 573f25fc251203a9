"""The cut of attention into tasks: every row reads every chunk of its keys once, and shares only equal blocks."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attention_cost import SHIPPED
from engine.attention_plan import MOST_SHARED_ROWS, Cut, Reader, plan, shared_runs
from engine.step_work import Threads

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
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.sampled_from([1, 4, 8, 100]),
    st.sampled_from([0, 1, 90]),
    st.sampled_from([None, 1, 3, 8]),
)
def test_every_row_reads_every_chunk_that_it_sees_once_and_in_order(
    seed: int, size: int, units: int, window: int, group: int | None
) -> None:
    readers = forest(random.Random(seed), size)
    tasks = plan(readers, Cut(CHUNK, PAGE, window, units, group is not None, group or 1))
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


def cut_of(threads: int, kv_heads: int, group: int = 1) -> Cut:
    on = Threads(threads, kv_heads)
    return Cut(CHUNK, PAGE, units=on.units, group=group, threads=on)


CUTS = st.builds(cut_of, st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, 4, 8, 16]))


@given(st.integers(0, 2**31), st.integers(2, 12), CUTS)
def test_rows_of_a_task_hold_the_same_blocks_and_see_all_their_keys(seed: int, size: int, cut: Cut) -> None:
    readers = forest(random.Random(seed), size)
    tasks = plan(readers, cut)
    for members, (begin, end), merged in zip(tasks.members, tasks.chunks, tasks.merged, strict=True):
        if len(members) == 1:
            continue
        assert merged, "another task reads the rest of these rows"
        first = readers[members[0]].blocks[begin * PAGES : end * PAGES]
        for member in members:
            assert (readers[member].blocks[begin * PAGES : end * PAGES] == first).all()
            assert readers[member].first >= end * CHUNK
        assert begin == 0 or end == begin + 1, "what was merged before it may not be merged again in another order"


@given(st.integers(0, 2**31), st.integers(2, 12), CUTS)
def test_shared_runs_of_a_reader_follow_each_other_from_its_first_chunk(seed: int, size: int, cut: Cut) -> None:
    readers = forest(random.Random(seed), size)
    shared_to = dict.fromkeys(range(size), 0)
    for run in shared_runs(readers, cut):
        assert len(run.members) > 1
        for member in run.members:
            assert shared_to[member] == run.begin < run.end
            shared_to[member] = run.end


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_decoding_rows_share_every_chunk_that_two_of_them_hold_on_one_thread(seed: int, size: int) -> None:
    source = random.Random(seed)
    readers = [Reader(row, 1, each.first, each.blocks) for row, each in enumerate(forest(source, size))]
    shared = dict.fromkeys(range(size), 0)
    for run in shared_runs(readers, cut_of(1, 1)):
        shared.update(dict.fromkeys(run.members, run.end))
    for index, reader in enumerate(readers):
        others = [each for each in readers if each is not reader]
        assert shared[index] == max(common_chunks(reader, other) for other in others)


def common_chunks(one: Reader, other: Reader) -> int:
    chunks = 0
    while (chunks + 1) * CHUNK <= min(one.first, other.first):
        if (one.blocks[: (chunks + 1) * PAGES] != other.blocks[: (chunks + 1) * PAGES]).any():
            break
        chunks += 1
    return chunks


# (members, rows of each, shared chunks, threads, KV heads, group) -> whether sharing was measured to be faster.
MEASURED = {
    # prefills: the more members and queries, the fewer vectors and copies of keys are saved
    (2, 12, 1, 1, 4, 3): True,
    (32, 16, 4, 4, 4, 3): True,
    (4, 10, 2, 4, 4, 3): True,
    (2, 8, 1, 1, 4, 8): False,
    (6, 16, 1, 4, 4, 3): False,
    # decode, and few queries that become many, whose keys are waited for
    (2, 1, 1, 1, 4, 3): True,
    (8, 1, 1, 4, 4, 3): True,
    (2, 2, 2, 1, 4, 3): False,
    # threads without work
    (2, 1, 1, 8, 1, 8): False,
    (16, 1, 8, 8, 1, 8): True,
}


@pytest.mark.parametrize(("shape", "wanted"), MEASURED.items())
def test_only_what_was_measured_to_be_faster_is_shared(
    shape: tuple[int, int, int, int, int, int], wanted: bool
) -> None:
    members, rows, chunks, threads, kv_heads, group = shape
    shared = np.arange(chunks * PAGES)
    readers = [
        Reader(rows * i, rows, chunks * CHUNK, np.append(shared, [1000 + i]).astype(np.int32)) for i in range(members)
    ]
    together = [task for task in plan(readers, cut_of(threads, kv_heads, group)).members if len(task) > 1]
    assert bool(together) is wanted


@pytest.mark.parametrize(("group", "rows"), [(3, 16), (8, 12), (16, 6)])
def test_members_that_fill_panels_by_themselves_leave_the_others_to_share(group: int, rows: int) -> None:
    shared, cheap = np.arange(PAGES), replace(SHIPPED, read_many=0.0, task=0.0, partial=0.0)
    for count, wanted in ((rows, 5), (rows + 1, 4)):
        counts = [1, 1, 1, 1, count]
        readers = [
            Reader(i, counted, CHUNK, np.append(shared, [100 + i, 200 + i]).astype(np.int32))
            for i, counted in enumerate(counts)
        ]
        (run,) = shared_runs(readers, Cut(CHUNK, PAGE, group=group, costs=cheap))
        assert len(run.members) == wanted


def test_chunks_that_do_not_pay_for_all_are_shared_by_those_who_share_more() -> None:
    """Three prompts over one chunk, two of them over seven more: one chunk leaves seven of eight threads without work."""
    trunk, branch = list(range(PAGES)), list(range(100, 100 + 7 * PAGES))
    tables = [[*trunk, *branch, 1000], [*trunk, *branch, 1001], [*trunk, *range(200, 200 + 7 * PAGES), 1002]]
    readers = [Reader(i, 1, 8 * CHUNK, np.array(table, dtype=np.int32)) for i, table in enumerate(tables)]
    few, many = cut_of(1, 1), cut_of(8, 1)
    assert [(run.members, run.begin, run.end) for run in shared_runs(readers, few)] == [
        ((0, 1, 2), 0, 1),
        ((0, 1), 1, 8),
    ]
    assert [(run.members, run.begin) for run in shared_runs(readers, many)] != [((0, 1, 2), 0)]


@pytest.mark.parametrize(("threads", "tasks_of_prefix"), [(1, 1), (2, 3), (4, 3)])
def test_the_chunks_of_a_prefix_are_tasks_of_their_own_where_threads_outnumber_kv_heads(
    threads: int, tasks_of_prefix: int
) -> None:
    shared = np.arange(3 * PAGES)
    readers = [Reader(i, 1, 3 * CHUNK, np.append(shared, [100 + i]).astype(np.int32)) for i in range(32)]
    tasks = plan(readers, cut_of(threads, 1))
    assert sum(len(members) > 1 for members in tasks.members) == tasks_of_prefix


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
