"""Runs benchmarks one after the other, each in a process of its own: `python -m benchmarks [names…] [--quick | --full]`.

Loopback only, bounded in time. Exit code 4 if one of them failed. What a benchmark started ends with it, and it with this process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks.processes import unwind_on_sigterm
from benchmarks.tied_process import tied

BENCHMARKS = (
    "engine",
    "shared_prefix",
    "mixed_load",
    "transfer",
    "handoff",
    "second_token",
    "controller",
    "disk_tier",
    "tiers",
    "blend",
    "blend_served",
    "blend_accuracy",
    "approximations",
)
WITH_PEERS = ("peers", "transfer_peers")  # compare with software that is not ours; they run only when asked for
NEEDS = {
    "cache_replay": "PDSERVE_TRACES",
    "tier_replay": "PDSERVE_TRACES",
}  # environment variables that name data; left out where they are not set
KNOWN = tuple(dict.fromkeys((*BENCHMARKS, *WITH_PEERS, *NEEDS)))
LIMIT_S = {"quick": 240.0, "full": 1200.0}
PEERS_LIMIT_S = 5400.0  # three engines, two dtypes, prompts of 8,192 tokens, and vLLM compiles
END_S = 90.0  # of a benchmark that was told to end: its cluster drains
FAILED = 4


def run(name: str, mode: str) -> bool:
    """True if it ended well within its time."""
    print(f"== {name} ({mode})", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--full"] if mode == "full" else [])]
    limit_s = PEERS_LIMIT_S if name == "peers" else LIMIT_S[mode]
    start_s = time.monotonic()
    process = subprocess.Popen(tied(command))
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        print(f"== {name} was ended after {limit_s:.0f} s", flush=True)
        return False
    finally:
        end(process)
    print(f"== {name}: exit code {code} after {time.monotonic() - start_s:.0f} s\n", flush=True)
    return code == 0


def end(process: subprocess.Popen[bytes]) -> None:
    """By SIGTERM, on which it ends what it started; by SIGKILL where that takes too long."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Results go to benchmarks/results/.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(KNOWN)}; default: all but peers")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="a few samples each (the default)")
    modes.add_argument("--full", action="store_true", help="as many samples as the figures need")
    modes.add_argument("--peers", action="store_true", help="full, and only what is compared with other software")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - set(KNOWN)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(KNOWN)}")
    supplied = tuple(name for name, variable in NEEDS.items() if os.environ.get(variable))
    names = given.names or (WITH_PEERS if given.peers else BENCHMARKS + supplied)
    mode = "full" if given.full or given.peers else "quick"
    failed = [name for name in names if not run(name, mode)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else 0


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
