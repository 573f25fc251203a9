"""A hundred real kills of a process that stores pages."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import layout_of
from kv_store.disk.posix import posix_mount
from kv_store.lru import Lru
from tests.kv_store import disk_child
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.disk_child import LIMITS, PAGES

KILLS = 100
LONGEST_STORE_S = 60.0
CONTENTS = [bytes_of(number) for number in range(PAGES)]


# Never "fork" here: a test process has threads, whose locks stay taken in the copy, and pipes that would outlive it there.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([disk_child.__name__])


def stored_until_killed(folder: Path, seed: int) -> set[str]:
    """Keys, in hex, that the child said are there when it was killed, after as many lines as `seed` says."""
    lines = random.Random(seed).randrange(1, 60)
    reading, writing = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=disk_child.store_for_ever, args=(folder, seed, writing))
    child.start()
    writing.close()
    stuck = threading.Timer(LONGEST_STORE_S, child.kill)
    stuck.start()
    there: set[str] = set()
    count = 0
    with os.fdopen(os.dup(reading.fileno())) as told, reading:
        for count, line in enumerate(told):
            if count == lines:
                child.kill()
            change, _, key = line.rstrip("\n").partition(" ")
            if not line.endswith("\n"):
                break  # its last words were cut off
            if change == "stored":
                there.add(key)
            elif change == "evicted":
                there.discard(key)
    stuck.cancel()
    child.join(LONGEST_STORE_S)
    assert child.exitcode == -signal.SIGKILL
    assert count >= lines, "it said nothing for a minute"
    return there


@pytest.mark.slow
def test_no_kill_makes_a_wrong_byte_or_loses_a_stored_page(tmp_path: Path) -> None:
    record_bytes = layout_of(SMALL, LIMITS).record_bytes
    for seed in range(KILLS):
        there = stored_until_killed(tmp_path, seed)
        tier = DiskTier(posix_mount(tmp_path), SMALL, LIMITS, Lru(), lambda change, pages: None)
        used_bytes = tier.used_bytes()
        readable: set[str] = set()
        for number in range(PAGES):
            into = [SMALL.empty()]
            if tier.read([page_of(number).id], into):
                assert (into[0] == CONTENTS[number]).all(), "a wrong byte was served"
                readable.add(key_of(number).hex())
        assert not tier.counters.verify_failures
        assert used_bytes == tier.used_bytes() == len(readable) * record_bytes
        # What the child evicted after its last words may be gone: no more than one batch stores and evicts.
        assert len(there - readable) <= 6 + 6
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= LIMITS.capacity_bytes
        tier.close()
