"""What the process that runs the tests holds, for tests of growth."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_LIBC = ctypes.CDLL(None)


def held() -> tuple[int, int]:
    """(bytes of anonymous memory, objects that the collector knows). Left out are pages of files, which a kernel short of memory
    drops and reads again, and memory that was freed to the allocator, of which each thread keeps some."""
    gc.collect()
    _LIBC.malloc_trim(0)
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    anonymous_kib = next(int(words[1]) for words in lines if words[0] == "RssAnon:")
    return anonymous_kib * 1024, len(gc.get_objects())
