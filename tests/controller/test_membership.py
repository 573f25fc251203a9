"""Membership of one worker: joining, silence, resets, restarts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.membership import (
    Command,
    ConnectionLost,
    DeclareLost,
    Dial,
    DrainOrdered,
    Event,
    Heard,
    Limits,
    Member,
    Registered,
    SessionOpened,
    Tick,
    step,
)

LIMITS = Limits(silence_s=1.5, join_s=5.0)


def run(*events: tuple[float, Event]) -> tuple[Member, list[Command]]:
    member, commands = Member(), list[Command]()
    for now, event in events:
        member, more = step(member, event, LIMITS, now)
        commands += more
    return member, commands


READY: tuple[tuple[float, Event], ...] = ((0, Registered(5, "a:1")), (0.1, SessionOpened(5, False)))


def test_a_worker_joins_and_is_ready() -> None:
    member, commands = run(*READY)
    assert member.takes_work
    assert commands == [Dial()]


def test_repeated_registrations_change_nothing() -> None:
    assert run(*READY, (0.2, Registered(5, "a:1"))) == run(*READY)
    assert run(*READY, (0.2, Registered(4, "a:0"))) == run(*READY)


def test_silence_is_death_but_not_our_own_deafness() -> None:
    assert run(*READY, (1.5, Tick()))[0].state == "READY"
    member, commands = run(*READY, (1.7, Tick()))
    assert member.state == "GONE"
    assert isinstance(commands[-1], DeclareLost)
    assert run(*READY, (1.7, Tick(held_up_s=1.0)))[0].state == "READY"
    assert run(*READY, (1.7, Tick(heard_s=0.5)))[0].state == "READY"


def test_heartbeats_keep_it_alive() -> None:
    beats = [(now / 2, Heard(False)) for now in range(1, 20)]
    assert run(*READY, *beats, (10.5, Tick()))[0].state == "READY"


def test_a_reset_is_redialled_once() -> None:
    member, commands = run(*READY, (1, ConnectionLost("reset")))
    assert not member.takes_work
    assert commands[-1] == Dial()
    assert run(*READY, (1, ConnectionLost("reset")), (1.1, SessionOpened(5, False)))[0].takes_work
    dead, commands = run(*READY, (1, ConnectionLost("reset")), (1.1, ConnectionLost("refused")))
    assert (dead.state, dead.lost_reason) == ("GONE", "refused")
    assert commands[-1] == DeclareLost("refused")


def test_a_session_that_the_worker_dropped_is_not_redialled() -> None:
    assert run(*READY, (1, ConnectionLost("overflow", final=True)))[0].state == "GONE"


def test_a_new_incarnation_ends_the_old_one() -> None:
    member, commands = run(*READY, (1, Registered(6, "a:2")))
    assert (member.state, member.address) == ("JOINING", "a:2")
    assert [type(command) for command in commands[1:]] == [DeclareLost, Dial]
    assert run(*READY, (1, ConnectionLost("reset")), (1.1, SessionOpened(6, False)))[0].state == "GONE"


def test_a_worker_that_never_opens_a_session_is_gone() -> None:
    assert run((0, Registered(5, "a:1")), (5.1, Tick()))[0].state == "GONE"
    assert run((0, Registered(5, "a:1")), (0.1, ConnectionLost("refused")))[0].state == "GONE"
    assert run((0, Registered(5, "a:1")), (0.1, ConnectionLost("refused")), (1, Registered(5, "a:1")))[1][-1] == Dial()


def test_draining_stays_draining() -> None:
    for drain in (DrainOrdered(), Heard(True)):
        member, _ = run(
            *READY, (1, drain), (1.1, Heard(False)), (1.2, ConnectionLost("x")), (1.3, SessionOpened(5, False))
        )
        assert member.state == "DRAINING"
        assert not member.takes_work


_EVENTS = st.one_of(
    st.builds(Registered, st.integers(1, 3), st.just("a:1")),
    st.builds(SessionOpened, st.integers(1, 3), st.booleans()),
    st.builds(Heard, st.booleans()),
    st.just(DrainOrdered()),
    st.builds(ConnectionLost, st.just("x"), st.booleans()),
    st.just(Tick()),
)


@given(st.lists(st.tuples(st.floats(0, 2), _EVENTS), max_size=40))
def test_every_incarnation_is_declared_lost_at_most_once_and_before_the_next_dial(
    events: list[tuple[float, Event]],
) -> None:
    member, now, alive = Member(), 0.0, False
    for delay, event in events:
        now += delay
        before = member
        member, commands = step(member, event, LIMITS, now)
        assert member.incarnation >= before.incarnation
        for command in commands:
            if isinstance(command, DeclareLost):
                assert alive, "nobody is lost twice"
                alive = False
            else:
                alive = True
        assert alive == (member.state != "GONE")
