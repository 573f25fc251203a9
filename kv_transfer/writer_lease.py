"""Owns the writer lease: who may still write into reserved destination blocks. Pure.

```
             Begun                     Verified
  GRANTED ------------> WRITING --------------------------> ENDED   commands: Activate
     |                     | Stopped, Aborted, Cut, expiry
     |                     v
     |                  FENCING --- Settled | EndpointDied -> ENDED   commands: EndWriter(error)
     |  Stopped, expiry    ^ grace over: CloseEndpoint, still FENCING
     +--------------------------------------------------> ENDED   commands: EndWriter(error)
```
A timeout alone never ends a writer that has begun: it only starts the fence. The writer ends when it said FIN and no receive
is posted any more (Settled), or when its endpoint is dead (EndpointDied). Only a writer that never began ends by expiry:
nothing was ever posted for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from kv_transfer.leases import expired
from pdserve.errors import LeaseExpired, PdserveError

# ---- states


@dataclass(frozen=True, slots=True)
class WriterGranted:
    """Reserved, ticket issued, no writer yet."""

    attempt: int
    expires_s: float
    ttl_s: float
    grace_s: float  # how long a fence waits for the peer's FIN


@dataclass(frozen=True, slots=True)
class WriterWriting:
    """One writer, known by its incarnation, renews by every message."""

    incarnation: int
    expires_s: float
    ttl_s: float
    grace_s: float


@dataclass(frozen=True, slots=True)
class WriterFencing:
    """The hand-off has failed (error) or was given back (None); bytes may still land."""

    error: PdserveError | None
    close_s: float


@dataclass(frozen=True, slots=True)
class WriterEnded:
    """No writer can touch the blocks any more."""

    error: PdserveError | None


WriterState = WriterGranted | WriterWriting | WriterFencing | WriterEnded

# ---- events


@dataclass(frozen=True, slots=True)
class WriterBegun:
    """A Begin whose ticket is right."""

    attempt: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class WriterHeard:
    """Any message of the writer: renews its lease."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class WriterVerified:
    """Commit came, every block arrived, every checksum matched, no receive is posted."""


@dataclass(frozen=True, slots=True)
class WriterStopped:
    """This side ends the hand-off; the writer is told and may say FIN."""

    error: PdserveError


@dataclass(frozen=True, slots=True)
class WriterAborted:
    """The writer gave up (error) or had nothing to hand off (None). It says FIN by that."""

    error: PdserveError | None


@dataclass(frozen=True, slots=True)
class WriterCut:
    """The writer cannot say FIN any more (stream lost, silent) or cannot be believed: fence without waiting."""

    error: PdserveError


@dataclass(frozen=True, slots=True)
class WriterSettled:
    """The writer said FIN and no receive is posted."""


@dataclass(frozen=True, slots=True)
class EndpointDied:
    """The data connection is closed and no receive is posted."""


@dataclass(frozen=True, slots=True)
class WriterTick:
    """Time passed."""


WriterEvent = (
    WriterBegun
    | WriterHeard
    | WriterVerified
    | WriterStopped
    | WriterAborted
    | WriterCut
    | WriterSettled
    | EndpointDied
    | WriterTick
)

# ---- commands


@dataclass(frozen=True, slots=True)
class AcceptWriter:
    """Answer Accepted as soon as the data connection is there."""


@dataclass(frozen=True, slots=True)
class RefuseBegin:
    """Answer this Begin with Refused; the lease is unmoved."""

    error: PdserveError


@dataclass(frozen=True, slots=True)
class TellWriter:
    """Send Refused: the hand-off is over, say FIN."""

    error: PdserveError


@dataclass(frozen=True, slots=True)
class CloseEndpoint:
    """Close the data connection, then report EndpointDied."""


@dataclass(frozen=True, slots=True)
class Activate:
    """Everything is verified: the request may run. The writer is done."""


@dataclass(frozen=True, slots=True)
class EndWriter:
    """Tell the owner of the blocks that the writer is done."""

    error: PdserveError | None


WriterCommand = AcceptWriter | RefuseBegin | TellWriter | CloseEndpoint | Activate | EndWriter

_Step = tuple[WriterState, tuple[WriterCommand, ...]]


def step_writer(state: WriterState, event: WriterEvent, now_s: float) -> _Step:
    """One transition. Events that do not fit the state leave it as it is."""
    match state:
        case WriterGranted():
            return _granted(state, event, now_s)
        case WriterWriting():
            return _writing(state, event, now_s)
        case WriterFencing():
            return _fencing(state, event, now_s)
        case WriterEnded():
            return _refuse_late_begin(state, event)
        case _:
            assert_never(state)


def writer_deadline_s(state: WriterState) -> float | None:
    """When the next WriterTick is due."""
    match state:
        case WriterGranted() | WriterWriting():
            return state.expires_s
        case WriterFencing():
            return state.close_s
        case WriterEnded():
            return None
        case _:
            assert_never(state)


def _granted(state: WriterGranted, event: WriterEvent, now_s: float) -> _Step:
    match event:
        case WriterBegun() if event.attempt != state.attempt:
            error = LeaseExpired(f"This reservation is for attempt {state.attempt}, not {event.attempt}.")
            return state, (RefuseBegin(error),)
        case WriterBegun():
            writing = WriterWriting(event.incarnation, now_s + state.ttl_s, state.ttl_s, state.grace_s)
            return writing, (AcceptWriter(),)
        case WriterStopped() | WriterCut() | WriterAborted():
            return WriterEnded(event.error), (EndWriter(event.error),)
        case WriterTick() if now_s >= state.expires_s:
            error = expired("reservation's", state.ttl_s)
            return WriterEnded(error), (EndWriter(error),)
        case WriterTick() | WriterHeard() | WriterVerified() | WriterSettled() | EndpointDied():
            return state, ()
        case _:
            assert_never(event)


def _writing(state: WriterWriting, event: WriterEvent, now_s: float) -> _Step:
    match event:
        case WriterBegun():
            return _refuse_late_begin(state, event)
        case WriterHeard() if event.incarnation == state.incarnation:
            return replace(state, expires_s=now_s + state.ttl_s), ()
        case WriterVerified():
            return WriterEnded(None), (Activate(),)
        case WriterStopped():
            return WriterFencing(event.error, now_s + state.grace_s), (TellWriter(event.error),)
        case WriterAborted():
            return WriterFencing(event.error, now_s + state.grace_s), ()
        case WriterCut():
            return WriterFencing(event.error, now_s), (TellWriter(event.error), CloseEndpoint())
        case WriterTick() if now_s >= state.expires_s:
            error = expired("writer's", state.ttl_s)
            return WriterFencing(error, now_s), (TellWriter(error), CloseEndpoint())
        case EndpointDied() | WriterHeard() | WriterSettled() | WriterTick():
            return state, ()
        case _:
            assert_never(event)


def _fencing(state: WriterFencing, event: WriterEvent, now_s: float) -> _Step:
    match event:
        case WriterSettled() | EndpointDied():
            return WriterEnded(state.error), (EndWriter(state.error),)
        case WriterCut():
            return replace(state, close_s=now_s), (CloseEndpoint(),)
        case WriterTick() if now_s >= state.close_s:
            return replace(state, close_s=now_s + _CLOSE_AGAIN_S), (CloseEndpoint(),)
        case WriterBegun():
            return _refuse_late_begin(state, event)
        case WriterHeard() | WriterVerified() | WriterStopped() | WriterAborted() | WriterTick():
            return state, ()
        case _:
            assert_never(event)


# The first close should do; asked again, because blocks must not stay fenced for ever.
_CLOSE_AGAIN_S = 1.0


def _refuse_late_begin(state: WriterState, event: WriterEvent) -> _Step:
    if isinstance(event, WriterBegun):
        return state, (RefuseBegin(LeaseExpired("This ticket was used already, or its hand-off is over.")),)
    return state, ()
