"""Owns the source lease: how long a prefill worker keeps blocks that a hand-off reads. Pure.

```
      Delivered, Failed, PeerLost, expiry           SendsSettled
   HELD ------------------------------> SETTLING ------------------> RELEASED   commands: ReleaseBlocks(error)
    ^ |                                  |    ^
    +-+ PeerHeard: renewed               +----+ grace over: CloseConnection
```
Blocks are released only when no send reads them any more; a close of the connection ends the sends that do not end by
themselves. A peer that confirms after the hand-off failed changes nothing: the attempt number tells the results apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from kv_transfer.leases import expired
from pdserve.errors import PdserveError


@dataclass(frozen=True, slots=True)
class SourceHeld:
    expires_s: float
    ttl_s: float
    grace_s: float


@dataclass(frozen=True, slots=True)
class SourceSettling:
    """Decided, but sends may still read the blocks."""

    error: PdserveError | None
    close_s: float


@dataclass(frozen=True, slots=True)
class SourceReleased:
    error: PdserveError | None


SourceState = SourceHeld | SourceSettling | SourceReleased


@dataclass(frozen=True, slots=True)
class PeerHeard:
    """Any message of the decode worker."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The decode worker activated the request."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Refused, or aborted on this side (None: there was nothing to hand off)."""

    error: PdserveError | None


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Its process or its stream is gone, or it is silent: sends to it are not waited for."""

    error: PdserveError


@dataclass(frozen=True, slots=True)
class SendsSettled:
    """No send is in progress."""


@dataclass(frozen=True, slots=True)
class SourceTick:
    """Time passed."""


SourceEvent = PeerHeard | Delivered | Failed | PeerLost | SendsSettled | SourceTick


@dataclass(frozen=True, slots=True)
class StopSending:
    """Announce nothing more, wait for the sends in progress, then report SendsSettled."""


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """The sends do not end by themselves: close the data connection."""


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    error: PdserveError | None


SourceCommand = StopSending | CloseConnection | ReleaseBlocks

_Step = tuple[SourceState, tuple[SourceCommand, ...]]


def step_source(state: SourceState, event: SourceEvent, now_s: float) -> _Step:
    match state:
        case SourceHeld():
            return _held(state, event, now_s)
        case SourceSettling():
            return _settling(state, event, now_s)
        case SourceReleased():
            return state, ()
        case _:
            assert_never(state)


def source_deadline_s(state: SourceState) -> float | None:
    """When the next SourceTick is due."""
    match state:
        case SourceHeld():
            return state.expires_s
        case SourceSettling():
            return state.close_s
        case SourceReleased():
            return None
        case _:
            assert_never(state)


def _held(state: SourceHeld, event: SourceEvent, now_s: float) -> _Step:
    match event:
        case PeerHeard():
            return replace(state, expires_s=now_s + state.ttl_s), ()
        case Delivered():
            return SourceSettling(None, now_s + state.grace_s), (StopSending(),)
        case Failed():
            return SourceSettling(event.error, now_s + state.grace_s), (StopSending(),)
        case PeerLost():
            return SourceSettling(event.error, now_s), (StopSending(),)
        case SourceTick() if now_s >= state.expires_s:
            error = expired("source", state.ttl_s)
            return SourceSettling(error, now_s + state.grace_s), (StopSending(),)
        case SendsSettled() | SourceTick():
            return state, ()
        case _:
            assert_never(event)


def _settling(state: SourceSettling, event: SourceEvent, now_s: float) -> _Step:
    match event:
        case SendsSettled():
            return SourceReleased(state.error), (ReleaseBlocks(state.error),)
        case SourceTick() if now_s >= state.close_s:
            return replace(state, close_s=now_s + _CLOSE_AGAIN_S), (CloseConnection(),)
        case PeerLost() if state.error is not None:
            return replace(state, close_s=min(state.close_s, now_s)), ()
        case PeerLost():
            # It confirmed all of it, and then its stream ended: that is how it should be. Our sends may see their own end a
            # turn later than its answer; closing the connection under them would fail every other hand-off that shares it.
            return state, ()
        case PeerHeard() | Delivered() | Failed() | SourceTick():
            return state, ()
        case _:
            assert_never(event)


_CLOSE_AGAIN_S = 1.0
