"""Owns the warm restart: what the same requests find before and after SIGKILL of the whole cluster, and how long until it answers.

Everything is killed: `pdserve up`, supervisor, controller, io processes, engines, and redis-server where there is one. Killed at once,
behind the last answer: what was not synced to disk by then is lost.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.live_cluster import LiveCluster, live_cluster
from benchmarks.random_model import LlamaShape, write_served_llama
from benchmarks.redis_process import has_redis, running_redis
from benchmarks.report import Measurement, Mode, compare, measure
from benchmarks.served_prompts import (
    PAGE_TOKENS,
    Asked,
    Prompt,
    ask,
    cluster_flags,
    disk_use,
    found_percent,
    random_prompt,
)

QUESTION_TOKENS = 64
# Of the bytes of all distinct pages. Only the disk holds all: what it has lost in the restart is missed.
DEVICE_SHARE, HOST_SHARE, DISK_SHARE, REDIS_SHARE = 0.15, 0.3, 1.5, 0.3
# Computing a page takes much longer than reading it, as with large models: what lies in a tier is worth loading.
SERVED = LlamaShape(layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1376, vocab=4096)
# 1 MiB of KV per page and little to compute: it fills a disk within a minute.
WIDE_KV = LlamaShape(layers=4, hidden=256, heads=16, kv_heads=16, head_dim=128, intermediate=512, vocab=4096)
WIDE_TOKENS = 512
WIDE_POOL_BYTES = 2**28
ASKED_AGAIN = 8
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Effort:
    documents: int
    document_tokens: int
    requests: int
    disk_gib: int  # for the time until it answers


EFFORTS: dict[Mode, Effort] = {"quick": Effort(8, 512, 24, 1), "full": Effort(20, 2048, 60, 10)}


def request_set(effort: Effort) -> list[Prompt]:
    """Documents by Zipf's law, each request with a question of its own behind its document."""
    rng = random.Random(effort.requests)
    vocab = SERVED.vocab
    documents = [random_prompt(rng, effort.document_tokens, vocab) for _ in range(effort.documents)]
    weights = [1 / (rank + 1) for rank in range(effort.documents)]
    chosen = rng.choices(documents, weights, k=effort.requests)
    return [document + random_prompt(rng, QUESTION_TOKENS, vocab) for document in chosen]


def page_bytes(shape: LlamaShape) -> int:
    return shape.kv_elements_per_token * PAGE_TOKENS * 4


def distinct_bytes(prompts: list[Prompt]) -> int:
    """Of all their pages, those of a common beginning counted once."""
    pages = {tuple(prompt[:end]) for prompt in prompts for end in range(PAGE_TOKENS, len(prompt) + 1, PAGE_TOKENS)}
    return len(pages) * page_bytes(SERVED)


def warm_restart(mode: Mode, threads: int) -> list[Measurement]:
    with tempfile.TemporaryDirectory(prefix="pdserve-model-") as folder:
        served = write_served_llama(Path(folder) / "served", SERVED)
        wide = write_served_llama(Path(folder) / "wide", WIDE_KV)
        return [*hit_rates(served, mode, threads), *ready_times(wide, mode, threads)]


def hit_rates(model: Path, mode: Mode, threads: int) -> list[Measurement]:
    """The whole set is asked into empty tiers, then twice more, and once after everything was killed and started anew."""
    prompts = request_set(EFFORTS[mode])
    size_bytes = distinct_bytes(prompts)
    settings: dict[str, str | int] = {
        "engine.kv_bytes": round(DEVICE_SHARE * size_bytes),
        "engine.threads": threads,
        "store.host_bytes": round(HOST_SHARE * size_bytes),
        "store.disk_bytes": round(DISK_SHARE * size_bytes),
    }
    with ExitStack() as stack:
        redis = stack.enter_context(running_redis(round(REDIS_SHARE * size_bytes))) if has_redis() else None
        settings |= {"store.redis_url": redis.url} if redis else {}
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdserve-bench-"))) / "state"
        flags = cluster_flags(model, ("--prefill", "1", "--decode", "1"), settings)
        with live_cluster(state, flags) as cluster:
            first, _, before = ([ask(cluster, prompt) for prompt in prompts] for _ in range(3))
            cluster.kill_everything()
            if redis is not None:
                redis.kill()
                redis.start()
        with live_cluster(state, flags) as cluster:
            after = [ask(cluster, prompt) for prompt in prompts]
    return rate_rows(first, before, after, "" if redis is None else ", Redis too")


def rate_rows(
    first: Sequence[Asked], before: Sequence[Asked], after: Sequence[Asked], killed: str
) -> list[Measurement]:
    name, gone = "hit rate of the same requests", f"SIGKILL of everything{killed}"
    held, kept = found_percent(before), found_percent(after)
    return [
        measure(f"{name}, asked for the first time", "% of tokens", [found_percent(first)], "higher"),
        measure(f"{name}, before {gone}", "% of tokens", [held], "higher"),
        compare(f"{name}, after {gone}", "% of tokens", [kept], ("before it", [held]), "higher"),
    ]


def fill_disk(cluster: LiveCluster, size_bytes: int) -> list[Prompt]:
    """Asks prompts until so many bytes lie on its disk, or twice as many as that should take; returns them."""
    asked: list[Prompt] = []
    most = 2 * size_bytes // (WIDE_TOKENS * WIDE_KV.kv_elements_per_token * 4)
    for prompt in islice(wide_prompts(), most):
        ask(cluster, prompt)
        asked.append(prompt)
        if disk_use(cluster)[1] >= size_bytes:
            break
    return asked


def wide_prompts() -> Iterator[Prompt]:
    rng = random.Random(WIDE_TOKENS)
    while True:
        yield random_prompt(rng, WIDE_TOKENS, WIDE_KV.vocab)


def forget_cached(folder: Path) -> None:
    """The kernel drops what it cached of the index logs below: the restart reads them from the disk."""
    for index in folder.rglob("index"):
        descriptor = os.open(index, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is dirty stays cached
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def ready_times(model: Path, mode: Mode, threads: int) -> list[Measurement]:
    """Seconds of `pdserve up` until a first request was answered: with nothing on disk, and with so many GiB after SIGKILL."""
    gib = EFFORTS[mode].disk_gib
    settings: dict[str, str | int] = {
        "engine.kv_bytes": WIDE_POOL_BYTES,
        "engine.threads": threads,
        "store.host_bytes": WIDE_POOL_BYTES,
        "store.disk_bytes": gib * GIB * 5 // 4,
    }
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        state = Path(folder) / "state"
        flags = cluster_flags(model, ("--prefill", "0", "--decode", "0", "--both", "1"), settings)
        with live_cluster(state, flags) as cluster:
            empty_s = cluster.ready_s
            prompts = fill_disk(cluster, gib * GIB)
            cluster.kill_everything()
        forget_cached(state)
        with live_cluster(state, flags) as cluster:
            ready_s, (_, used_bytes) = cluster.ready_s, disk_use(cluster)
            again = [ask(cluster, prompt) for prompt in random.Random(1).sample(prompts[:-ASKED_AGAIN], ASKED_AGAIN)]
    name = "seconds from pdserve up to its first answer"
    empty = ("with nothing on disk", [empty_s])
    return [
        compare(f"{name}, {gib} GiB of KV on disk, after SIGKILL of everything", "s", [ready_s], empty, "lower"),
        measure("KV on disk that it found", "GiB", [used_bytes / GIB], "higher"),
        measure(f"hit rate of {ASKED_AGAIN} of its prompts", "% of tokens", [found_percent(again)], "higher"),
    ]
