"""Owns the membership of one worker, as this controller sees it. Pure.

      registered           session open            drains
    ------------> JOINING --------------> READY ------------> DRAINING
                     |                      |                     |
                     | no session in time   | silent, reset and not there any more, new incarnation
                     v                      v                     v
                   GONE <-----------------------------------------+      (registers again -> JOINING)

A reset connection is redialled once, at once: if that fails, the worker is dead. Silence of `silence_s` is death too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from controller.operations import WorkerState


@dataclass(frozen=True, slots=True)
class Limits:
    silence_s: float  # missed heartbeats after which a worker counts as dead
    join_s: float = 5.0  # from registration to an open session


@dataclass(frozen=True, slots=True)
class Member:
    incarnation: int = 0
    address: str = ""
    state: WorkerState = "GONE"
    heard_s: float = 0.0
    redialling: bool = False
    lost_reason: str = ""

    @property
    def takes_work(self) -> bool:
        return self.state == "READY" and not self.redialling


@dataclass(frozen=True, slots=True)
class Registered:
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class SessionOpened:
    incarnation: int
    draining: bool


@dataclass(frozen=True, slots=True)
class Heard:
    draining: bool


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    pass


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The stream ended, or a dial failed. `final`: the worker said that it is over, so there is nothing to redial."""

    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """`heard_s`: when its last frame came; `held_up_s`: for so long this process could not listen, which is no silence."""

    heard_s: float = 0.0
    held_up_s: float = 0.0


Event: TypeAlias = Registered | SessionOpened | Heard | DrainOrdered | ConnectionLost | Tick


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a session; any older one of this worker is over."""


@dataclass(frozen=True, slots=True)
class DeclareLost:
    """Everything that was dispatched to this incarnation is lost."""

    reason: str
    silent: bool = False  # nothing says that it died: an overloaded machine looks the same


Command: TypeAlias = Dial | DeclareLost
Step: TypeAlias = tuple[Member, tuple[Command, ...]]


def step(member: Member, event: Event, limits: Limits, now: float) -> Step:
    match event:
        case Registered():
            return _registered(member, event, now)
        case SessionOpened():
            return _opened(member, event, now)
        case Heard(draining=draining):
            return replace(member, heard_s=now, state=_drained(member.state, draining)), ()
        case DrainOrdered():
            return replace(member, state=_drained(member.state, True)), ()
        case ConnectionLost():
            return _disconnected(member, event, now)
        case Tick(heard_s=heard_s, held_up_s=held_up_s):
            heard_s = min(now, max(member.heard_s, heard_s) + held_up_s)
            return _tick(replace(member, heard_s=heard_s), limits, now)
        case _:
            assert_never(event)


def _registered(member: Member, event: Registered, now: float) -> Step:
    if event.incarnation < member.incarnation:
        return member, ()  # of a process that is dead already
    if member.state != "GONE" and event.incarnation == member.incarnation:
        return member, ()
    joining = Member(event.incarnation, event.address, "JOINING", now)
    if member.state == "GONE":
        return joining, (Dial(),)
    return joining, (DeclareLost("The worker was started again."), Dial())


def _opened(member: Member, event: SessionOpened, now: float) -> Step:
    if member.state == "GONE":
        return member, ()
    if event.incarnation != member.incarnation:
        return _gone(member, "Another incarnation of the worker answered.")
    state: WorkerState = "DRAINING" if event.draining or member.state == "DRAINING" else "READY"
    return replace(member, state=state, heard_s=now, redialling=False), ()


def _disconnected(member: Member, event: ConnectionLost, now: float) -> Step:
    if member.state == "GONE":
        return member, ()
    if member.state == "JOINING" or member.redialling or event.final:
        return _gone(member, event.reason)
    return replace(member, redialling=True, heard_s=now), (Dial(),)


def _tick(member: Member, limits: Limits, now: float) -> Step:
    silent_s = now - member.heard_s
    match member.state:
        case "GONE":
            return member, ()
        case "JOINING":
            return _gone(member, "No session could be opened.") if silent_s > limits.join_s else (member, ())
        case "READY" | "DRAINING":
            if silent_s <= limits.silence_s:
                return member, ()
            return _gone(member, f"Nothing was heard of the worker for {limits.silence_s:g} s.", silent=True)
        case _:
            assert_never(member.state)


def _gone(member: Member, reason: str, *, silent: bool = False) -> Step:
    return replace(member, state="GONE", redialling=False, lost_reason=reason), (DeclareLost(reason, silent),)


def _drained(state: WorkerState, draining: bool) -> WorkerState:
    return "DRAINING" if draining and state == "READY" else state
