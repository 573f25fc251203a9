"""The table of held dispatches: arrivals, tokens, ends, tombstones; and what an adopter is given."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Dispatch, Sampling, StepTokens, Work
from worker_runtime.dispatches import (
    DispatchEvent,
    DispatchTable,
    cancel_choices,
    record_first_tokens,
    record_step,
)
from worker_runtime.token_batches import replayed_batch, token_batch

SAMPLING = Sampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, 7, 8, 0, False, ())


class Silent:
    """A handler that does nothing."""

    def engine_event(self, event: DispatchEvent) -> None: ...

    def tokens_ended(self, sequence: int) -> None: ...

    def cancel(self) -> None: ...


def work(key: int, *, accepted: int = 0, choices: tuple[int, ...] = (0,)) -> Work:
    tokens = array("i", range(10 + accepted)).tobytes()
    return Work(Dispatch(key, 1), f"r{key}", choices, tokens, 10, SAMPLING, b"")


def step(*columns: tuple[int, int, int, int, int]) -> StepTokens:
    """Columns of (key, choice, index, token, finish)."""
    keys, choices, indices, tokens, finish = zip(*columns, strict=True)
    return StepTokens(1, keys, (1,) * len(keys), choices, indices, tokens, finish)


def test_only_a_dispatch_that_is_neither_known_nor_buried_is_new() -> None:
    table = DispatchTable(tombstone_s=20)
    assert table.arrival(Dispatch(1, 1)) == "new"
    table.admit(work(1), "c0", Silent())
    assert table.arrival(Dispatch(1, 1)) == "known"
    assert table.arrival(Dispatch(1, 2)) == "new"
    table.bury(Dispatch(1, 1), now=5)
    assert table.arrival(Dispatch(1, 1)) == "buried"
    table.expire(now=24)
    assert table.arrival(Dispatch(1, 1)) == "buried"
    table.expire(now=25)
    assert table.arrival(Dispatch(1, 1)) == "new"


def test_each_owner_is_told_its_own_columns_and_unknown_ones_are_told_nobody() -> None:
    table = DispatchTable(tombstone_s=20)
    table.admit(work(1), "c0", Silent())
    table.admit(work(2), "c1", Silent())
    event = step((1, 0, 0, 50, 0), (2, 0, 0, 60, 0), (3, 0, 0, 70, 0), (1, 9, 0, 80, 0))
    assert record_step(table, event) == {"c0": [0], "c1": [1]}
    batch = token_batch(event, [1])
    assert (list(batch.request_keys), list(batch.token_ids)) == ([2], [60])


def test_a_cancelled_choice_takes_no_more_tokens() -> None:
    table = DispatchTable(tombstone_s=20)
    record = table.admit(work(1, choices=(0, 1)), "c0", Silent())
    assert cancel_choices(record, (1,)) == (1,)
    assert cancel_choices(record, (1,)) == ()
    assert record_step(table, step((1, 0, 0, 50, 0), (1, 1, 0, 60, 0))) == {"c0": [0]}
    assert not record.tokens_ended
    assert cancel_choices(record, ()) == (0,)
    assert record.tokens_ended


def test_an_ended_dispatch_is_kept_until_its_last_event_is_acknowledged() -> None:
    table = DispatchTable(tombstone_s=20)
    table.admit(work(1), "c0", Silent())
    table.settle(Dispatch(1, 1), sequence=7)
    assert list(table.live()) == []
    table.acknowledged("c0", 6, now=0)
    assert table.get(Dispatch(1, 1)) is not None
    table.acknowledged("c1", 7, now=0)
    assert table.get(Dispatch(1, 1)) is not None
    table.acknowledged("c0", 7, now=0)
    assert table.get(Dispatch(1, 1)) is None
    assert table.arrival(Dispatch(1, 1)) == "buried"


def test_choices_that_the_first_tokens_leave_out_have_ended() -> None:
    table = DispatchTable(tombstone_s=20)
    record = table.admit(work(1, choices=(0, 1)), "c0", Silent())
    record_first_tokens(record, ((1, 42),))
    assert record.choices[0].finish
    assert (record.choices[1].token_ids, record.choices[1].next_index) == ([42], 1)


@given(accepted=st.integers(0, 6), drawn=st.lists(st.integers(100, 999), max_size=8), start=st.integers(0, 14))
def test_an_adopter_gets_every_token_from_its_next_index_on(accepted: int, drawn: list[int], start: int) -> None:
    table = DispatchTable(tombstone_s=20)
    record = table.admit(work(1, accepted=accepted), "c0", Silent())
    for offset, token in enumerate(drawn):
        record_step(table, step((1, 0, accepted + offset, token, 2 if offset == len(drawn) - 1 else 0)))
    output = [*range(10, 10 + accepted), *drawn]
    batch = replayed_batch(record, {0: start})
    assert list(batch.token_ids) == output[start:]
    assert list(batch.indices) == list(range(start, len(output)))
    assert bool(batch.finish_reasons and batch.finish_reasons[-1]) == bool(drawn and start < len(output))
