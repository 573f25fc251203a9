"""The process that streams memory runs as long as it is wanted, and no longer."""

from __future__ import annotations

import os

from benchmarks.memory_stream import memory_stream
from pdserve.local_process import children_of, local_process


def test_memory_is_streamed_inside_and_by_nobody_afterwards() -> None:
    ours = [local_process(os.getpid())]
    before = {child.pid for child in children_of(ours)}
    with memory_stream():
        (stream,) = [child for child in children_of(ours) if child.pid not in before]
        assert stream.alive()
    assert not stream.alive()
