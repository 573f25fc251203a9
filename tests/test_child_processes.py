"""What tests start ends with the process that runs them, however that one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from pdserve.local_process import local_process, wait_gone
from tests.child_processes import end, killed_after
from tests.e2e.cluster import wait_until

DEADLINE_S = 60.0
ROOT = Path(__file__).parents[1]
SLEEP = "import time; time.sleep(600)"
PARENT = f"""
import subprocess, sys
from tests.child_processes import tied
child = subprocess.Popen(tied([sys.executable, "-c", {SLEEP!r}]))
print(child.pid, flush=True)
child.wait()
"""
LEAVING = """
import sys, time
from tests.child_processes import end, when_we_end
when_we_end(["touch", sys.argv[1]])
end(when_we_end(["touch", sys.argv[2]]))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_tied_child_is_killed_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with parent, killed_after(parent, DEADLINE_S):
        assert parent.stdout is not None
        child = local_process(int(parent.stdout.readline()))
        assert child.alive()
        end(parent)
        assert wait_gone([child], DEADLINE_S) == []


def test_what_is_to_be_done_after_us_is_done_once_we_are_killed(tmp_path: Path) -> None:
    done, other = tmp_path / "done", tmp_path / "other"
    parent = subprocess.Popen(
        [sys.executable, "-c", LEAVING, str(done), str(other)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with parent, killed_after(parent, DEADLINE_S):
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        assert not done.exists()
        end(parent)
    wait_until(done.exists, "the command has run", DEADLINE_S)
    assert not other.exists(), "its keeper had been ended"


def test_a_silent_child_is_killed_at_its_deadline() -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE, text=True)
    with child, killed_after(child, 0.1):
        assert child.stdout is not None
        assert child.stdout.readline() == ""
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
