"""The life of one choice: whatever arrives, each output index is accepted once, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controller.lifecycle import (
    FINAL,
    HELD_LIMIT,
    Accept,
    Activated,
    CancelAttempt,
    Cancelled,
    ChoiceState,
    Command,
    Dispatched,
    Event,
    Fail,
    Fatal,
    Lost,
    Refused,
    Requeue,
    StopMatched,
    Token,
    step,
)
from pdserve.errors import DeadlineExceeded, RequestQuarantined, TransferFailed, WorkerLost

LOST = WorkerLost("gone")
LENGTH = 12


@dataclass
class Choice:
    """Drives the machine as the shell does."""

    state: ChoiceState = field(default_factory=lambda: ChoiceState(max_attempts=5))
    accepted: list[int] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    now: float = 0.0

    def give(self, event: Event) -> list[Command]:
        self.now += 1
        self.state, commands = step(self.state, event, self.now)
        self.accepted += [command.token.index for command in commands if isinstance(command, Accept)]
        self.commands += commands
        return list(commands)

    def failure(self) -> object:
        return next((command.error for command in self.commands if isinstance(command, Fail)), None)


def token(attempt: int, index: int, last: int = LENGTH - 1) -> Token:
    return Token(attempt, index, 100 + index, "length" if index == last else None)


def dispatched(*, split: bool = True, attempt: int = 1) -> Choice:
    choice = Choice()
    choice.give(Dispatched(attempt, split))
    return choice


def test_a_split_choice_goes_through_every_phase() -> None:
    choice = dispatched()
    phases = [choice.state.phase]
    for event in (token(1, 0), Activated(1), token(1, 1), token(1, 2, last=2)):
        choice.give(event)
        phases.append(choice.state.phase)
    assert phases == ["PREFILLING", "TRANSFERRING", "DECODING", "DECODING", "FINISHED"]
    assert choice.accepted == [0, 1, 2]


def test_a_local_choice_decodes_from_its_first_token_on() -> None:
    choice = dispatched(split=False)
    choice.give(token(1, 0))
    assert choice.state.phase == "DECODING"


def test_the_second_token_proves_the_activation() -> None:
    choice = dispatched()
    choice.give(token(1, 1))
    assert choice.accepted == []
    choice.give(token(1, 0))
    assert choice.accepted == [0, 1]
    assert choice.state.phase == "DECODING"


def test_the_loss_of_the_prefill_worker_matters_until_the_decode_worker_has_taken_over() -> None:
    choice = dispatched()
    choice.give(token(1, 0))
    assert choice.give(Lost(1, "prefill", LOST)) == [CancelAttempt(1), Requeue()]
    choice.give(Dispatched(2, True))
    choice.give(token(2, 1))
    choice.give(Activated(2))
    assert choice.give(Lost(2, "prefill", LOST)) == []
    assert choice.give(Lost(2, "decode", LOST)) == [CancelAttempt(2), Requeue()]


def test_an_activation_without_its_first_token_is_still_lost_with_the_prefill_worker() -> None:
    choice = dispatched()
    choice.give(Activated(1))
    choice.give(token(1, 1))
    assert choice.give(Lost(1, "prefill", LOST)) == [CancelAttempt(1), Requeue()]


def test_attempts_are_bounded() -> None:
    choice = Choice()
    for attempt in range(1, 6):
        choice.give(Dispatched(attempt, False))
        choice.give(Lost(attempt, "decode", LOST))
    assert choice.state.phase == "FAILED"
    assert choice.failure() is LOST


def test_two_deaths_during_prefill_are_poison() -> None:
    choice = dispatched()
    choice.give(Lost(1, "prefill", LOST, "suspect"))
    assert choice.state.prefill_deaths == 1
    choice.give(Dispatched(2, True))
    choice.give(Lost(2, "prefill", LOST, "poison"))
    assert isinstance(choice.failure(), RequestQuarantined)


def test_deaths_that_are_not_blamed_on_a_prompt_are_no_poison() -> None:
    choice = Choice()
    for attempt in range(1, 4):
        choice.give(Dispatched(attempt, True))
        choice.give(Lost(attempt, "prefill", LOST))
    assert choice.state.phase == "QUEUED"
    assert choice.state.prefill_deaths == 0


def test_a_death_counts_also_where_the_peer_told_of_the_failed_hand_off_first() -> None:
    choice = dispatched()
    for attempt in (1, 2):
        choice.give(Refused(attempt, TransferFailed("reset")))
        if attempt == 1:
            choice.give(Dispatched(2, True))
            choice.give(Lost(1, "prefill", LOST, "suspect"))
            choice.give(Lost(1, "prefill", LOST, "suspect"))
            assert choice.state.prefill_deaths == 1
        else:
            choice.give(Lost(2, "prefill", LOST, "poison"))
    assert isinstance(choice.failure(), RequestQuarantined)


def test_deaths_while_decoding_are_no_poison() -> None:
    choice = Choice()
    for attempt in range(1, 4):
        choice.give(Dispatched(attempt, True))
        choice.give(token(attempt, attempt - 1))
        choice.give(Activated(attempt))
        choice.give(Lost(attempt, "decode", LOST, "poison"))
    assert choice.state.phase == "QUEUED"


def test_a_gap_that_never_closes_starts_a_new_attempt() -> None:
    choice = dispatched()
    for index in range(1, HELD_LIMIT + 2):
        choice.give(token(1, index, last=10**6))
    assert choice.state.phase == "QUEUED"
    assert choice.accepted == []


def test_ends_are_told_to_the_attempt_and_are_final() -> None:
    for event, phase in ((StopMatched(), "FINISHED"), (Cancelled(), "CANCELLED"), (Fatal(LOST), "FAILED")):
        choice = dispatched()
        assert CancelAttempt(1) in choice.give(event)
        assert choice.state.phase == phase
        for later in (token(1, 0), Lost(1, "both", LOST), Cancelled(), Fatal(DeadlineExceeded("late"))):
            assert choice.give(later) == []


def test_a_choice_that_waits_has_no_attempt_to_cancel() -> None:
    assert Choice().give(Cancelled()) == []


@given(st.lists(st.integers(0, LENGTH - 1), max_size=60), st.permutations(range(LENGTH)))
def test_any_order_and_any_repetition_of_one_attempt_gives_each_index_once(extra: list[int], order: list[int]) -> None:
    choice = dispatched()
    for index in extra + list(order):
        choice.give(token(1, index))
    assert choice.accepted == list(range(LENGTH))
    assert choice.state.phase == "FINISHED"
    assert choice.state.held == ()


class Interleavings(RuleBasedStateMachine):
    """Late, duplicate and reordered events of all attempts, losses, refusals: indices come once, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = Choice(ChoiceState(max_attempts=1000))
        self.attempt = 0

    @rule(split=st.booleans())
    def dispatch(self, split: bool) -> None:
        if self.choice.state.phase == "QUEUED":
            self.attempt += 1
            self.choice.give(Dispatched(self.attempt, split))

    @rule(behind=st.integers(0, 3), index=st.integers(0, LENGTH - 1))
    def report(self, behind: int, index: int) -> None:
        self.choice.give(token(max(0, self.attempt - behind), index))

    @rule()
    def report_next(self) -> None:
        self.choice.give(token(self.attempt, min(self.choice.state.next_index, LENGTH - 1)))

    @rule(behind=st.integers(0, 2))
    def activate(self, behind: int) -> None:
        self.choice.give(Activated(max(0, self.attempt - behind)))

    @rule(behind=st.integers(0, 2))
    def lose_decode(self, behind: int) -> None:
        self.choice.give(Lost(max(0, self.attempt - behind), "decode", LOST))

    @rule(behind=st.integers(0, 2))
    def refuse(self, behind: int) -> None:
        self.choice.give(Refused(max(0, self.attempt - behind), LOST))

    @invariant()
    def indices_come_once_in_order(self) -> None:
        assert self.choice.accepted == list(range(len(self.choice.accepted)))
        assert self.choice.state.next_index == len(self.choice.accepted)

    @invariant()
    def what_is_held_is_ahead(self) -> None:
        held = [each.index for each in self.choice.state.held]
        assert held == sorted(set(held))
        assert all(index > self.choice.state.next_index for index in held)

    @invariant()
    def the_end_is_clean(self) -> None:
        state = self.choice.state
        if state.phase in FINAL:
            assert state.held == ()
        if state.phase == "FINISHED":
            assert len(self.choice.accepted) == LENGTH


Interleavings.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestInterleavings = Interleavings.TestCase


def test_states_are_immutable() -> None:
    state = ChoiceState(5)
    following, _ = step(state, Dispatched(1, True), 1.0)
    assert state.phase == "QUEUED"
    assert msgspec.structs.replace(following, phase="QUEUED").attempt == 1
