"""A thread of the store that gives way, and another thread of its process that waits for the interpreter."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kv_store.interpreter import give_way

DEADLINE_S = 20.0


@pytest.fixture
def no_switches() -> Iterator[None]:
    """No thread loses the interpreter unless it gives it away."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(3600.0)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("no_switches")
def test_a_thread_that_waits_for_the_interpreter_gets_it_from_one_that_gives_way() -> None:
    door, came = threading.Lock(), threading.Event()

    def come() -> None:
        with door:
            came.set()

    waiting = threading.Thread(target=come, daemon=True)
    with door:
        waiting.start()
    give_up_s = time.monotonic() + DEADLINE_S
    while not came.is_set() and time.monotonic() < give_up_s:
        give_way()
    assert came.is_set()
    waiting.join(DEADLINE_S)
