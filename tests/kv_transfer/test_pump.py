"""The pump alone, over lanes without UCX: whom it turns, when it sleeps, and what wakes it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from kv_transfer.transports.pump import Pump

DEADLINE_S = 10.0


class SocketLane:
    """Busy until a byte comes. `asleep`: how often it was armed."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.busy = True
        self.asleep = 0
        self.news = asyncio.Event()
        self.everyone = False
        self.armable = True

    def turn(self, spins: int, *, everyone: bool) -> bool:
        self.everyone = everyone
        try:
            self.busy = self.busy and not self.near.recv(1)
        except BlockingIOError:
            return False
        self.news.set()
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    def arm(self) -> int | None:
        assert self.everyone, "before a sleep all that wait are looked at"
        self.asleep += 1
        self.news.set()
        return self.near.fileno() if self.armable else None


@pytest.fixture
async def lane() -> AsyncIterator[SocketLane]:
    made = SocketLane()
    yield made
    made.near.close()
    made.far.close()


@pytest.fixture
def rare_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only descriptors and `wake` end a sleep."""
    monkeypatch.setattr("kv_transfer.transports.pump.ASLEEP_S", 3600.0)


@pytest.fixture
async def pump(lane: SocketLane) -> AsyncIterator[Pump]:
    """Drives the lane."""
    made = Pump()
    made.add(lane)
    yield made
    made.remove(lane)
    made.stop()


@pytest.mark.usefixtures("rare_turns", "pump")
async def test_a_lane_that_waits_for_its_peer_sleeps_until_its_descriptor_is_readable(lane: SocketLane) -> None:
    await lane.until(lambda: lane.asleep > 0)
    lane.far.send(b"x")
    await lane.until(lambda: not lane.busy)


@pytest.mark.usefixtures("rare_turns")
async def test_a_wake_ends_the_sleep(lane: SocketLane, pump: Pump) -> None:
    await lane.until(lambda: lane.asleep == 1)
    pump.wake()
    await lane.until(lambda: lane.asleep == 2)


@pytest.mark.usefixtures("rare_turns")
async def test_a_lane_that_is_removed_while_the_loop_sleeps_is_watched_no_more(lane: SocketLane, pump: Pump) -> None:
    await lane.until(lambda: lane.asleep == 1)
    pump.remove(lane)
    assert not asyncio.get_running_loop().remove_reader(lane.near.fileno())


@pytest.mark.usefixtures("pump")
async def test_a_sleep_ends_after_a_while_though_no_descriptor_tells(lane: SocketLane) -> None:
    await lane.until(lambda: lane.asleep >= 3)


@pytest.mark.usefixtures("rare_turns")
async def test_a_lane_without_a_descriptor_is_turned_all_the_time(lane: SocketLane, pump: Pump) -> None:
    lane.armable = False
    pump.wake()  # out of a sleep over the descriptor that it had
    await lane.until(lambda: lane.asleep >= 3)
