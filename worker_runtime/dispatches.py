"""Owns the dispatches that a worker holds: their owner, the tokens of each choice, and the tombstones of those it knew. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.protocol import (
    Dispatch,
    KvReady,
    LogprobRow,
    PrefillDone,
    Reserved,
    ReserveRefused,
    Started,
    StepTokens,
    Work,
    WorkFailed,
)
from kv_transfer.keys import TOKEN_BYTES

DispatchEvent = Started | KvReady | PrefillDone | Reserved | ReserveRefused | WorkFailed
Arrival = Literal["new", "known", "buried"]
UNFINISHED = 0  # of protobuf FinishReason, as is
CANCELLED = 3


class DispatchHandler(Protocol):
    """What a role does with one dispatch."""

    def engine_event(self, event: DispatchEvent) -> None: ...

    def tokens_ended(self, sequence: int) -> None:
        """The last choice ended with the tokens reported under `sequence`."""

    def cancel(self) -> None:
        """Stops everything of it, here and at the peer. The record is buried already."""


@dataclass(slots=True)
class ChoiceRecord:
    """Output of one choice that this worker knows, from output index `first_index` on."""

    first_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobRow | None] = field(default_factory=list)
    finish: int = UNFINISHED

    @property
    def next_index(self) -> int:
        return self.first_index + len(self.token_ids)


@dataclass(slots=True)
class DispatchRecord:
    work: Work
    owner: str
    handler: DispatchHandler
    choices: dict[int, ChoiceRecord]
    final_sequence: int | None = None  # of the event that ended it; kept until that is acknowledged

    @property
    def ended(self) -> bool:
        return self.final_sequence is not None

    @property
    def tokens_ended(self) -> bool:
        return all(choice.finish != UNFINISHED for choice in self.choices.values())

    def accepted_tokens(self) -> memoryview:
        """Output ids that came with the work, from output index 0 on: int32."""
        return memoryview(self.work.token_ids)[self.work.prompt_tokens * TOKEN_BYTES :].cast("i")


class DispatchTable:
    def __init__(self, tombstone_s: float) -> None:
        self._tombstone_s = tombstone_s
        self._records: dict[Dispatch, DispatchRecord] = {}
        self._tombstones: dict[Dispatch, float] = {}  # dispatch -> time of expiry, in that order

    def arrival(self, dispatch: Dispatch) -> Arrival:
        """What a command for new work finds: only "new" may have an effect."""
        if dispatch in self._records:
            return "known"
        return "buried" if dispatch in self._tombstones else "new"

    def admit(self, work: Work, owner: str, handler: DispatchHandler) -> DispatchRecord:
        assert self.arrival(work.dispatch) == "new"
        first_index = len(work.token_ids) // TOKEN_BYTES - work.prompt_tokens
        choices = {choice: ChoiceRecord(first_index) for choice in work.choices}
        record = self._records[work.dispatch] = DispatchRecord(work, owner, handler, choices)
        return record

    def get(self, dispatch: Dispatch) -> DispatchRecord | None:
        return self._records.get(dispatch)

    def live(self) -> Iterator[DispatchRecord]:
        return (record for record in self._records.values() if not record.ended)

    def owned_by(self, owner: str) -> list[DispatchRecord]:
        return [record for record in self._records.values() if record.owner == owner]

    def records(self) -> list[DispatchRecord]:
        return list(self._records.values())

    def settle(self, dispatch: Dispatch, sequence: int) -> None:
        """It ended with the event of that sequence; unknown dispatches change nothing."""
        record = self._records.get(dispatch)
        if record is not None and not record.ended:
            record.final_sequence = sequence

    def acknowledged(self, owner: str, sequence: int, now: float) -> None:
        for record in self.owned_by(owner):
            if record.final_sequence is not None and record.final_sequence <= sequence:
                self.bury(record.work.dispatch, now)

    def forget(self, dispatch: Dispatch) -> None:
        """As if it had never come."""
        self._records.pop(dispatch, None)

    def bury(self, dispatch: Dispatch, now: float) -> None:
        """Forgets it; commands that arrive late find the tombstone."""
        self._records.pop(dispatch, None)
        self._tombstones.pop(dispatch, None)
        self._tombstones[dispatch] = now + self._tombstone_s

    def expire(self, now: float) -> None:
        while self._tombstones:
            dispatch, deadline = next(iter(self._tombstones.items()))
            if deadline > now:
                return
            del self._tombstones[dispatch]


def record_step(table: DispatchTable, event: StepTokens) -> dict[str, list[int]]:
    """Enters the tokens of one step. Returns the columns that each owner must be told; columns of dispatches that are
    unknown or ended, and of choices that were cancelled, are in none."""
    columns: dict[str, list[int]] = {}
    for column, (key, attempt) in enumerate(zip(event.request_keys, event.attempts, strict=True)):
        record = table.get(Dispatch(key, attempt))
        choice = record.choices.get(event.choices[column]) if record is not None and not record.ended else None
        if record is None or choice is None or choice.finish != UNFINISHED:
            continue
        choice.token_ids.append(event.token_ids[column])
        choice.logprobs.append(event.logprobs[column] if event.logprobs else None)
        choice.finish = event.finish[column]
        columns.setdefault(record.owner, []).append(column)
    return columns


def record_first_tokens(record: DispatchRecord, first_tokens: Sequence[tuple[int, int]]) -> None:
    """Enters the tokens that a prefill worker drew; choices that are not listed ended with theirs."""
    going_on = dict(first_tokens)
    for number, choice in record.choices.items():
        if choice.finish != UNFINISHED:
            continue
        if number in going_on:
            choice.token_ids.append(going_on[number])
            choice.logprobs.append(None)
        else:
            choice.finish = CANCELLED


def cancel_choices(record: DispatchRecord, choices: Sequence[int]) -> tuple[int, ...]:
    """Marks `choices` (empty = all) as finished. Returns those that were running."""
    running = tuple(
        number
        for number, choice in record.choices.items()
        if choice.finish == UNFINISHED and (not choices or number in choices)
    )
    for number in running:
        record.choices[number].finish = CANCELLED
    return running
