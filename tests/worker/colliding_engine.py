"""Owns the native engine's process in a test build whose keys have few bits. Environment KEY_BITS, FINGERPRINT_BITS: how many."""

from __future__ import annotations

import os
import sys

from tests.kv_transfer.short_keys import shorten_keys
from worker.engine_main import open_native
from worker_runtime.engine_process import host_engine

if __name__ == "__main__":
    shorten_keys(int(os.environ["KEY_BITS"]), int(os.environ["FINGERPRINT_BITS"]))
    sys.exit(host_engine(int(sys.argv[1]), int(sys.argv[2]), open_native))
