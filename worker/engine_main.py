"""Owns the entry point of the engine process: the native engine behind the link. Started by the io process alone."""

from __future__ import annotations

import os
import sys

from engine.native import NativeEngine
from engine.protocol import EventSink
from service_kit.config import ClusterConfig
from service_kit.core_binding import engine_threads, listed_cores
from worker_runtime.engine_process import host_engine


def open_native(config: ClusterConfig, sink: EventSink) -> NativeEngine:
    pool = config.pool
    workers = max(1, pool.prefill + pool.decode + pool.both)
    cores = listed_cores(config.engine.cores)
    # OpenMP has bound this thread to the first of its cores by now: only unbound it tells how many there are.
    threads = engine_threads(config.engine, cores, workers, len(os.sched_getaffinity(0)))
    return NativeEngine.open(config.model, config.engine.model_copy(update={"threads": threads}), sink)


if __name__ == "__main__":
    sys.exit(host_engine(int(sys.argv[1]), int(sys.argv[2]), open_native))
