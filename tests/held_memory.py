"""What the process that runs the tests holds, for tests of growth."""

from __future__ import annotations

import gc
from pathlib import Path


def held() -> tuple[int, int]:
    """(bytes of anonymous memory, objects that the collector knows). Pages of files are left out: a kernel short of memory drops
    them and reads them again, whoever is at work."""
    gc.collect()
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    anonymous_kib = next(int(words[1]) for words in lines if words[0] == "RssAnon:")
    return anonymous_kib * 1024, len(gc.get_objects())
