"""Owns a process that stores pages until it is killed. Says on standard output which pages are on disk and which left."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits
from kv_store.disk.posix import posix_mount
from kv_store.lru import Lru
from kv_store.page import Page
from kv_store.tier import Change
from tests.kv_store.chains import SMALL, bytes_of, page_of

PAGES = 64
LIMITS = DiskLimits(capacity_bytes=275_000, segment_bytes=4096 + 4 * 8192)


def say(change: Change, pages: Sequence[Page]) -> None:
    for page in pages:
        sys.stdout.write(f"{change} {page.id.key.hex()}\n")
    sys.stdout.flush()


def store_for_ever(folder: Path, seed: int, said: Connection) -> None:
    """Its standard output is the write end `said`: what it says is in the pipe when it is killed."""
    os.dup2(said.fileno(), 1)
    said.close()
    sys.stdout = os.fdopen(1, "w")
    rng = random.Random(seed)
    tier = DiskTier(posix_mount(folder), SMALL, LIMITS, Lru(), say)
    contents = [bytes_of(number) for number in range(PAGES)]
    while True:
        first = rng.randrange(PAGES)
        numbers = [number % PAGES for number in range(first, first + rng.randint(1, 6))]
        tier.write([page_of(number) for number in numbers], [contents[number] for number in numbers])
