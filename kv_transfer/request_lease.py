"""Owns the request lease: a dispatch on a worker, held by the controller that sent it. Pure.

```
            ControllerLost              Adopted (attempt not lower)
   HELD --------------------> ORPHANED -----------------------------> HELD
    |                            | expiry
    | Finished, CancelAsked      v
    +-------------------------> ENDED (tombstone) --- tombstone over --> FORGOTTEN
```
An orphan goes on computing into a bounded buffer. A cancel leaves a tombstone for twice the lease, so that a late or repeated
command for this attempt finds that it ended; a higher attempt is a new dispatch and is not held back by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

TOMBSTONE_LEASES = 2
EndReason = Literal["finished", "cancelled", "orphan_expired"]


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """Durations of one worker's configuration."""

    orphan_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class RequestHeld:
    attempt: int
    terms: RequestTerms


@dataclass(frozen=True, slots=True)
class RequestOrphaned:
    attempt: int
    terms: RequestTerms
    expires_s: float


@dataclass(frozen=True, slots=True)
class RequestEnded:
    attempt: int
    reason: EndReason
    forget_s: float


@dataclass(frozen=True, slots=True)
class RequestForgotten:
    """Nothing is known of this dispatch any more."""


RequestState = RequestHeld | RequestOrphaned | RequestEnded | RequestForgotten


@dataclass(frozen=True, slots=True)
class ControllerLost:
    """The session of the controller that holds the request is gone."""


@dataclass(frozen=True, slots=True)
class Adopted:
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelAsked:
    attempt: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The engine ended it: EOS, length, failure."""


@dataclass(frozen=True, slots=True)
class RequestTick:
    """Time passed."""


RequestEvent = ControllerLost | Adopted | CancelAsked | Finished | RequestTick


@dataclass(frozen=True, slots=True)
class BufferOutput:
    """Keep the output, bounded, for whoever adopts the request."""


@dataclass(frozen=True, slots=True)
class ReplayOutput:
    """Send the adopter what was kept, then go on."""


@dataclass(frozen=True, slots=True)
class RefuseCommand:
    """The command names an attempt that this worker does not hold."""

    message: str


@dataclass(frozen=True, slots=True)
class StopWork:
    """Cancel in the engine."""


RequestCommand = BufferOutput | ReplayOutput | RefuseCommand | StopWork

_Step = tuple[RequestState, tuple[RequestCommand, ...]]


def step_request(state: RequestState, event: RequestEvent, now_s: float) -> _Step:
    match state:
        case RequestHeld():
            return _held(state, event, now_s)
        case RequestOrphaned():
            return _orphaned(state, event, now_s)
        case RequestEnded():
            return _ended(state, event, now_s)
        case RequestForgotten():
            return state, _refuse_adoption(event, "is not known here")
        case _:
            assert_never(state)


def request_deadline_s(state: RequestState) -> float | None:
    """When the next RequestTick is due."""
    match state:
        case RequestOrphaned():
            return state.expires_s
        case RequestEnded():
            return state.forget_s
        case RequestHeld() | RequestForgotten():
            return None
        case _:
            assert_never(state)


def _held(state: RequestHeld, event: RequestEvent, now_s: float) -> _Step:
    match event:
        case ControllerLost():
            return RequestOrphaned(state.attempt, state.terms, now_s + state.terms.orphan_s), (BufferOutput(),)
        case Adopted():
            return _adopt(state, event)
        case CancelAsked():
            return _cancel(state, event, now_s)
        case Finished():
            return _end(state, "finished", now_s), ()
        case RequestTick():
            return state, ()
        case _:
            assert_never(event)


def _orphaned(state: RequestOrphaned, event: RequestEvent, now_s: float) -> _Step:
    match event:
        case Adopted():
            return _adopt(state, event)
        case CancelAsked():
            return _cancel(state, event, now_s)
        case RequestTick() if now_s >= state.expires_s:
            return _end(state, "orphan_expired", now_s), (StopWork(),)
        case ControllerLost() | Finished() | RequestTick():
            # A finished orphan stays adoptable: its last tokens are still in the buffer.
            return state, ()
        case _:
            assert_never(event)


def _ended(state: RequestEnded, event: RequestEvent, now_s: float) -> _Step:
    if now_s >= state.forget_s:
        return RequestForgotten(), _refuse_adoption(event, "is not known here")
    return state, _refuse_adoption(event, f"ended here ({state.reason})")


def _adopt(state: RequestHeld | RequestOrphaned, event: Adopted) -> _Step:
    if event.attempt < state.attempt:
        return state, (RefuseCommand(f"Attempt {event.attempt} is older than {state.attempt}, which runs here."),)
    return RequestHeld(event.attempt, state.terms), (ReplayOutput(),)


def _cancel(state: RequestHeld | RequestOrphaned, event: CancelAsked, now_s: float) -> _Step:
    if event.attempt < state.attempt:
        return state, ()
    return _end(state, "cancelled", now_s), (StopWork(),)


def _end(state: RequestHeld | RequestOrphaned, reason: EndReason, now_s: float) -> RequestEnded:
    return RequestEnded(state.attempt, reason, now_s + TOMBSTONE_LEASES * state.terms.lease_s)


def _refuse_adoption(event: RequestEvent, why: str) -> tuple[RequestCommand, ...]:
    return (RefuseCommand(f"The dispatch {why}."),) if isinstance(event, Adopted) else ()
