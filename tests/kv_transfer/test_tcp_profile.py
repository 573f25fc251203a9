"""UCX over TCP alone, several sockets for each peer: every message comes, and none into memory that was given up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.transports.ucx_profiles import PROFILES, STREAMS
from tests.child_processes import tied

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


def test_every_profile_says_how_many_streams_it_has() -> None:
    assert PROFILES.keys() == STREAMS.keys()
    assert STREAMS["tcp"] > 1


@pytest.mark.parametrize("seed", [1, 2])
def test_messages_spread_over_sockets_come_whole_and_never_late(seed: int) -> None:
    command = tied([sys.executable, "-m", "tests.kv_transfer.tcp_profile_process", str(seed)])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.stdout == "ok\n", done.stderr[-2000:]
