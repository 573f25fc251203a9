"""Owns the life of one choice of a request: which tokens count, what a loss means, when it is over. Pure.

             dispatched            first token             activated, or a second token
    QUEUED ------------> PREFILLING ----------> TRANSFERRING ----------> DECODING
      ^                      |        (local: straight to DECODING)         |
      |                      |                   |                          |
      +---- retry edge: the worker of the attempt was lost, or refused -----+
                             |                   |                          |
                             +---- last token, stop string ---------------> FINISHED
                             +---- no attempt left, poison, fatal error --> FAILED
                             +---- client left, operator ----------------> CANCELLED

Only (current attempt, next index) is accepted; tokens of the current attempt that come too early, because two workers report,
wait in a small buffer; everything else is dropped. So each output index is accepted once, in order, whatever arrives.

States, events and commands are msgspec structs, not dataclasses: one of each is made per token, at a tenth of the cost.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, assert_never

import msgspec

from controller.operations import RequestState
from controller.request import FinishReason, Logprobs
from controller.suspicion import Blame
from pdserve.errors import InternalError, PdserveError, RequestQuarantined

HELD_LIMIT = 256  # tokens of one choice that wait for an earlier one
Side: TypeAlias = Literal["prefill", "decode", "both"]
FINAL: frozenset[RequestState] = frozenset({"FINISHED", "FAILED", "CANCELLED"})


class Token(msgspec.Struct, frozen=True):
    """One reported token."""

    attempt: int
    index: int
    token_id: int
    finish: FinishReason | None = None
    logprobs: Logprobs | None = None


class ChoiceState(msgspec.Struct, frozen=True):
    max_attempts: int
    phase: RequestState = "QUEUED"
    attempt: int = 0  # current or last; 0 = none yet
    tries: int = 0
    split: bool = False  # this attempt runs on two workers
    activated: bool = False  # the decode worker of this attempt has taken over
    first_index: int = 0  # output index at which this attempt began
    next_index: int = 0
    held: tuple[Token, ...] = ()
    prefill_deaths: int = 0  # at which this prompt was suspected
    suspect: int = 0  # attempt that was refused during prefill: its worker's death may still become known
    since_s: float = 0.0  # when `phase` was entered

    @property
    def decoded(self) -> bool:
        """More than the first token of this attempt was accepted."""
        return self.next_index > self.first_index + 1


# ---- events


class Dispatched(msgspec.Struct, frozen=True):
    attempt: int
    split: bool


class Activated(msgspec.Struct, frozen=True):
    attempt: int


class Lost(msgspec.Struct, frozen=True):
    """The worker that holds `side` of the attempt died or fell silent."""

    attempt: int
    side: Side
    error: PdserveError
    blame: Blame = "none"  # for its death, on this prompt; a worker that fell silent is nobody's fault


class Refused(msgspec.Struct, frozen=True):
    """The attempt ended without harm before or while it ran (no capacity, hand-off failed): another may do better."""

    attempt: int
    error: PdserveError


class Fatal(msgspec.Struct, frozen=True):
    """Nothing can help: deadline, invalid for the engine, bug."""

    error: PdserveError


class StopMatched(msgspec.Struct, frozen=True):
    """A stop string was completed by the last accepted token."""


class Cancelled(msgspec.Struct, frozen=True):
    pass


Event: TypeAlias = Dispatched | Token | Activated | Lost | Refused | Fatal | StopMatched | Cancelled

# ---- commands


class Accept(msgspec.Struct, frozen=True):
    """Append the token to the output."""

    token: Token


class CancelAttempt(msgspec.Struct, frozen=True):
    """Tell the attempt's workers to stop this choice."""

    attempt: int


class Requeue(msgspec.Struct, frozen=True):
    """Dispatch again from the prompt and the accepted tokens."""


class Fail(msgspec.Struct, frozen=True):
    error: PdserveError


Command: TypeAlias = Accept | CancelAttempt | Requeue | Fail
Step: TypeAlias = tuple[ChoiceState, tuple[Command, ...]]


def step(state: ChoiceState, event: Event, now: float) -> Step:
    if state.phase in FINAL:
        return state, ()
    match event:
        case Token():
            return _token(state, event, now)
        case Dispatched(attempt=attempt, split=split):
            return _dispatched(state, attempt, split, now)
        case Activated(attempt=attempt):
            return (_activate(state, now), ()) if _is_current(state, attempt) else (state, ())
        case Lost(attempt=attempt):
            return _lost(state, event, now) if _is_current(state, attempt) else _lost_late(state, event, now)
        case Refused(attempt=attempt, error=error):
            return _refused(state, error, now) if _is_current(state, attempt) else (state, ())
        case Fatal(error=error):
            return _end(state, "FAILED", now, Fail(error))
        case StopMatched():
            return _end(state, "FINISHED", now)
        case Cancelled():
            return _end(state, "CANCELLED", now)
        case _:
            assert_never(event)


def _is_current(state: ChoiceState, attempt: int) -> bool:
    return attempt == state.attempt and state.phase != "QUEUED"


def _dispatched(state: ChoiceState, attempt: int, split: bool, now: float) -> Step:
    assert state.phase == "QUEUED", "a choice has one live attempt"
    assert attempt > state.attempt, "attempts only rise"
    following = ChoiceState(
        max_attempts=state.max_attempts,
        phase="PREFILLING",
        attempt=attempt,
        tries=state.tries + 1,
        split=split,
        first_index=state.next_index,
        next_index=state.next_index,
        prefill_deaths=state.prefill_deaths,
        suspect=state.suspect,
        since_s=now,
    )
    return following, ()


def _token(state: ChoiceState, token: Token, now: float) -> Step:
    if token.attempt != state.attempt or state.phase == "QUEUED" or token.index < state.next_index:
        return state, ()
    if token.index > state.next_index:
        return _hold(state, token, now)
    state = _advance(state, token, now)
    if not state.held:
        return state, (Accept(token),)
    commands: list[Command] = [Accept(token)]
    while state.phase not in FINAL and state.held and state.held[0].index == state.next_index:
        following = state.held[0]
        state = _advance(msgspec.structs.replace(state, held=state.held[1:]), following, now)
        commands.append(Accept(following))
    return state, tuple(commands)


def _advance(state: ChoiceState, token: Token, now: float) -> ChoiceState:
    """The state after `token`, which is the next one."""
    phase = _phase_after(state, token)
    return ChoiceState(
        state.max_attempts,
        phase,
        state.attempt,
        state.tries,
        state.split,
        state.activated,
        state.first_index,
        state.next_index + 1,
        () if phase == "FINISHED" else state.held,
        state.prefill_deaths,
        state.suspect,
        state.since_s if phase == state.phase else now,
    )


def _phase_after(state: ChoiceState, token: Token) -> RequestState:
    if token.finish is not None:
        return "FINISHED"
    if not state.split or state.activated or state.next_index > state.first_index:
        return "DECODING"
    return "TRANSFERRING"


def _hold(state: ChoiceState, token: Token, now: float) -> Step:
    if any(held.index == token.index for held in state.held):
        return state, ()
    if len(state.held) >= HELD_LIMIT:
        error = InternalError(f"Output index {state.next_index} never came, {HELD_LIMIT} later ones did.")
        return _retry(state, error, now)
    held = tuple(sorted((*state.held, token), key=lambda each: each.index))
    return msgspec.structs.replace(state, held=held), ()


def _activate(state: ChoiceState, now: float) -> ChoiceState:
    if state.phase == "TRANSFERRING":
        return msgspec.structs.replace(state, activated=True, phase="DECODING", since_s=now)
    return msgspec.structs.replace(state, activated=True)


def _lost(state: ChoiceState, event: Lost, now: float) -> Step:
    if event.side == "prefill" and state.phase == "DECODING":
        return state, ()  # its part was done
    if state.phase != "PREFILLING" or event.side == "decode" or event.blame == "none":
        return _retry(state, event.error, now)
    state, commands = _count_death(state, event.blame, now)
    return (state, commands) if state.phase in FINAL else _retry(state, event.error, now)


def _lost_late(state: ChoiceState, event: Lost, now: float) -> Step:
    """The other worker of the pair had told of the failed hand-off before the death was known."""
    if event.attempt != state.suspect or event.side == "decode" or event.blame == "none":
        return state, ()
    return _count_death(msgspec.structs.replace(state, suspect=0), event.blame, now)


def _count_death(state: ChoiceState, blame: Blame, now: float) -> Step:
    state = msgspec.structs.replace(state, prefill_deaths=state.prefill_deaths + 1)
    if blame != "poison":
        return state, ()
    return _end(state, "FAILED", now, Fail(_quarantined(state.prefill_deaths)))


def _refused(state: ChoiceState, error: PdserveError, now: float) -> Step:
    if state.phase == "PREFILLING":
        state = msgspec.structs.replace(state, suspect=state.attempt)
    return _retry(state, error, now)


def _retry(state: ChoiceState, error: PdserveError, now: float) -> Step:
    if state.tries >= state.max_attempts:
        return _end(state, "FAILED", now, Fail(error))
    queued = msgspec.structs.replace(state, phase="QUEUED", held=(), activated=False, since_s=now)
    return queued, (CancelAttempt(state.attempt), Requeue())


def _end(state: ChoiceState, phase: RequestState, now: float, *commands: Command) -> Step:
    ended = msgspec.structs.replace(state, phase=phase, held=(), since_s=now)
    stop: tuple[Command, ...] = () if state.phase == "QUEUED" else (CancelAttempt(state.attempt),)
    return ended, (*stop, *commands)


def _quarantined(deaths: int) -> RequestQuarantined:
    return RequestQuarantined(
        f"{deaths} workers died while they computed this prompt, so it is not tried again. "
        "Send a different prompt, or report it with the request id."
    )
