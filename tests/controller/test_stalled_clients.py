"""Clients that take nothing of what they are sent."""

from __future__ import annotations

from controller.stalled_clients import StalledClients


def looks(*buffered: dict[str, int]) -> list[list[str]]:
    """One look each second, at connections that count as stalled after three."""
    clients = StalledClients[str](stall_s=3.0)
    return [clients.look(lengths, float(second)) for second, lengths in enumerate(buffered)]


def test_a_buffer_that_stays_as_it_is_stalls() -> None:
    assert looks(*[{"a": 70_000}] * 5) == [[], [], [], ["a"], ["a"]]


def test_a_client_that_takes_a_little_now_and_then_is_left_alone() -> None:
    assert looks({"a": 9}, {"a": 9}, {"a": 9}, {"a": 8}, {"a": 8}, {"a": 8}, {"a": 7}) == [[]] * 7


def test_a_client_that_took_everything_is_never_stalled() -> None:
    assert looks(*[{"a": 0}] * 9) == [[]] * 9


def test_time_counts_from_when_something_began_to_wait() -> None:
    assert looks({"a": 5}, {"a": 5}, {"a": 0}, {"a": 5}, {"a": 5}, {"a": 5}, {"a": 5}) == [[]] * 6 + [["a"]]


def test_connections_are_judged_apart_and_forgotten_when_they_are_gone() -> None:
    assert looks({"a": 5, "b": 5}, {"a": 5, "b": 4}, {}, {"a": 5}, {"a": 5, "b": 4}, {"a": 5}, {"a": 5}) == (
        [[]] * 6 + [["a"]]
    )
