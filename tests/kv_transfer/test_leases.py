"""The two lease machines of a hand-off: every transition that matters, and invariants over random event sequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.leases import DispatchKey
from kv_transfer.source_lease import (
    CloseConnection,
    Delivered,
    Failed,
    PeerHeard,
    PeerLost,
    ReleaseBlocks,
    SendsSettled,
    SourceEvent,
    SourceHeld,
    SourceReleased,
    SourceSettling,
    SourceState,
    SourceTick,
    StopSending,
    source_deadline_s,
    step_source,
)
from kv_transfer.writer_lease import (
    AcceptWriter,
    Activate,
    CloseEndpoint,
    EndpointDied,
    EndWriter,
    RefuseBegin,
    TellWriter,
    WriterAborted,
    WriterBegun,
    WriterCommand,
    WriterCut,
    WriterEnded,
    WriterEvent,
    WriterFencing,
    WriterGranted,
    WriterHeard,
    WriterSettled,
    WriterState,
    WriterStopped,
    WriterTick,
    WriterVerified,
    WriterWriting,
    step_writer,
    writer_deadline_s,
)
from pdserve.errors import Cancelled, LeaseExpired, TransferFailed

GRANTED = WriterGranted(attempt=3, expires_s=10.0, ttl_s=10.0, grace_s=1.0)
WRITING = WriterWriting(incarnation=7, expires_s=10.0, ttl_s=10.0, grace_s=1.0)
ERROR = TransferFailed("broken")


class TestWriterLease:
    def test_a_begin_with_the_right_attempt_makes_the_writer(self) -> None:
        state, commands = step_writer(GRANTED, WriterBegun(3, 7), 4.0)
        assert state == WriterWriting(7, 14.0, 10.0, 1.0)
        assert commands == (AcceptWriter(),)

    @pytest.mark.parametrize("attempt", [0, 2, 4])
    def test_another_attempt_is_refused_and_changes_nothing(self, attempt: int) -> None:
        state, commands = step_writer(GRANTED, WriterBegun(attempt, 7), 4.0)
        assert state == GRANTED
        assert isinstance(commands[0], RefuseBegin)

    def test_a_second_begin_is_refused_in_every_later_state(self) -> None:
        for later in (WRITING, WriterFencing(ERROR, 5.0), WriterEnded(None)):
            state, commands = step_writer(later, WriterBegun(3, 8), 1.0)
            assert state == later
            assert isinstance(commands[0], RefuseBegin)

    def test_only_the_writer_itself_renews(self) -> None:
        assert step_writer(WRITING, WriterHeard(7), 5.0)[0] == WriterWriting(7, 15.0, 10.0, 1.0)
        assert step_writer(WRITING, WriterHeard(6), 5.0) == (WRITING, ())

    def test_a_writer_that_never_began_ends_by_expiry(self) -> None:
        assert step_writer(GRANTED, WriterTick(), 9.9) == (GRANTED, ())
        state, commands = step_writer(GRANTED, WriterTick(), 10.0)
        assert isinstance(state, WriterEnded)
        assert isinstance(state.error, LeaseExpired)
        assert commands == (EndWriter(state.error),)

    def test_a_writer_that_began_is_fenced_by_expiry_and_does_not_end(self) -> None:
        state, commands = step_writer(WRITING, WriterTick(), 10.0)
        assert isinstance(state, WriterFencing)
        assert isinstance(commands[0], TellWriter)
        assert commands[1] == CloseEndpoint()
        for now_s in (11.0, 100.0, 1e6):
            state, commands = step_writer(state, WriterTick(), now_s)
            assert isinstance(state, WriterFencing)
            assert commands == (CloseEndpoint(),)
        state, commands = step_writer(state, EndpointDied(), 1e6)
        assert isinstance(state, WriterEnded)
        assert isinstance(commands[0], EndWriter)

    def test_a_stopped_writer_may_say_fin_and_keeps_its_connection(self) -> None:
        state, commands = step_writer(WRITING, WriterStopped(ERROR), 5.0)
        assert (state, commands) == (WriterFencing(ERROR, 6.0), (TellWriter(ERROR),))
        assert step_writer(state, WriterSettled(), 5.5) == (WriterEnded(ERROR), (EndWriter(ERROR),))

    def test_an_abort_without_an_error_gives_the_blocks_back(self) -> None:
        state, commands = step_writer(WRITING, WriterAborted(None), 5.0)
        assert commands == ()
        assert step_writer(state, WriterSettled(), 5.5) == (WriterEnded(None), (EndWriter(None),))

    def test_verified_activates_once(self) -> None:
        state, commands = step_writer(WRITING, WriterVerified(), 5.0)
        assert (state, commands) == (WriterEnded(None), (Activate(),))
        assert step_writer(state, WriterVerified(), 6.0) == (state, ())

    def test_a_fenced_writer_cannot_activate(self) -> None:
        fencing = WriterFencing(ERROR, 6.0)
        assert step_writer(fencing, WriterVerified(), 5.0) == (fencing, ())


WRITER_EVENTS: st.SearchStrategy[WriterEvent] = st.one_of(
    st.builds(WriterBegun, st.integers(2, 4), st.integers(6, 8)),
    st.builds(WriterHeard, st.integers(6, 8)),
    st.sampled_from(
        [
            WriterVerified(),
            WriterStopped(ERROR),
            WriterAborted(None),
            WriterAborted(Cancelled("x")),
            WriterCut(ERROR),
            WriterSettled(),
            EndpointDied(),
            WriterTick(),
        ]
    ),
)
DELAYS = st.floats(0, 15)


@given(st.lists(st.tuples(WRITER_EVENTS, DELAYS), max_size=30))
def test_a_writer_ends_once_and_only_by_fin_fence_death_or_never_having_begun(
    steps: list[tuple[WriterEvent, float]],
) -> None:
    state: WriterState = GRANTED
    now_s = 0.0
    endings: list[WriterCommand] = []
    for event, delay_s in steps:
        now_s += delay_s
        before = state
        state, commands = step_writer(state, event, now_s)
        ended = [command for command in commands if isinstance(command, Activate | EndWriter)]
        endings += ended
        if ended and not isinstance(before, WriterGranted):
            assert isinstance(event, WriterVerified | WriterSettled | EndpointDied), "ended by something else"
        if isinstance(before, WriterEnded):
            assert state == before
        assert isinstance(state, WriterEnded) == bool(endings)
        assert (writer_deadline_s(state) is None) == isinstance(state, WriterEnded)
        if any(isinstance(command, AcceptWriter) for command in commands):
            assert isinstance(before, WriterGranted)
    assert len(endings) <= 1


class TestSourceLease:
    HELD = SourceHeld(expires_s=10.0, ttl_s=10.0, grace_s=1.0)

    def test_every_message_of_the_peer_renews(self) -> None:
        assert step_source(self.HELD, PeerHeard(), 5.0)[0] == SourceHeld(15.0, 10.0, 1.0)

    def test_delivery_releases_when_the_sends_are_settled(self) -> None:
        state, commands = step_source(self.HELD, Delivered(), 5.0)
        assert (state, commands) == (SourceSettling(None, 6.0), (StopSending(),))
        assert step_source(state, SendsSettled(), 5.1) == (SourceReleased(None), (ReleaseBlocks(None),))

    def test_sends_that_do_not_settle_lose_their_connection(self) -> None:
        state, _ = step_source(self.HELD, Failed(ERROR), 5.0)
        assert step_source(state, SourceTick(), 5.9) == (state, ())
        state, commands = step_source(state, SourceTick(), 6.0)
        assert commands == (CloseConnection(),)
        assert isinstance(state, SourceSettling)

    def test_a_lost_peer_gets_no_grace(self) -> None:
        state, _ = step_source(self.HELD, PeerLost(ERROR), 5.0)
        assert step_source(state, SourceTick(), 5.0)[1] == (CloseConnection(),)

    def test_the_end_of_the_stream_after_delivery_closes_nothing_under_a_send_that_is_about_to_end(self) -> None:
        state, _ = step_source(self.HELD, Delivered(), 5.0)
        state, _ = step_source(state, PeerLost(ERROR), 5.0)
        assert step_source(state, SourceTick(), 5.0)[1] == ()
        assert step_source(state, SendsSettled(), 5.0)[1] == (ReleaseBlocks(None),)

    def test_a_confirmation_after_the_failure_changes_nothing(self) -> None:
        state, _ = step_source(self.HELD, Failed(ERROR), 5.0)
        assert step_source(state, Delivered(), 5.1) == (state, ())


SOURCE_EVENTS: st.SearchStrategy[SourceEvent] = st.sampled_from(
    [PeerHeard(), Delivered(), Failed(ERROR), Failed(None), PeerLost(ERROR), SendsSettled(), SourceTick()]
)


@given(st.lists(st.tuples(SOURCE_EVENTS, DELAYS), max_size=30))
def test_source_blocks_are_released_once_and_only_when_no_send_reads_them(
    steps: list[tuple[SourceEvent, float]],
) -> None:
    state: SourceState = TestSourceLease.HELD
    now_s = 0.0
    released = 0
    for event, delay_s in steps:
        now_s += delay_s
        state, commands = step_source(state, event, now_s)
        if any(isinstance(command, ReleaseBlocks) for command in commands):
            assert isinstance(event, SendsSettled)
            released += 1
        if isinstance(state, SourceHeld):
            assert now_s < state.expires_s or not isinstance(event, SourceTick)
        assert (source_deadline_s(state) is None) == isinstance(state, SourceReleased)
    assert released <= 1


def test_a_dispatch_key_reads_as_request_and_attempt() -> None:
    assert str(DispatchKey(0xAB, 2)) == "00000000000000ab/2"
