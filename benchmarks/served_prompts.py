"""Owns prompts of random tokens for a cluster with tiers: how they are asked, and what their answers tell."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.live_cluster import LiveCluster

PAGE_TOKENS = 16
MODEL_NAME = "m"
Prompt = list[int]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: seconds from sending it to its only token, how long it was, and how much of it was not computed."""

    seconds: float
    tokens: int
    cached_tokens: int


def ask(cluster: LiveCluster, prompt: Prompt) -> Asked:
    started_s = time.monotonic()
    body: dict[str, object] = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    answer = cluster.post("/v1/completions", body)
    seconds = time.monotonic() - started_s
    usage = answer["usage"]
    assert isinstance(usage, dict)
    return Asked(seconds, len(prompt), int(usage["prompt_tokens_details"]["cached_tokens"]))


def found_percent(asked: Sequence[Asked]) -> float:
    """Of their tokens, those that were not computed."""
    return 100 * sum(each.cached_tokens for each in asked) / sum(each.tokens for each in asked)


def random_prompt(rng: random.Random, tokens: int, vocab: int) -> Prompt:
    return [rng.randrange(10, vocab) for _ in range(tokens)]


def disk_use(cluster: LiveCluster) -> tuple[int, int]:
    """Pages and bytes on the disks of all workers."""
    workers = cluster.get("/api/v1/kv")["workers"]
    assert isinstance(workers, list)
    tiers = [tier for worker in workers for tier in worker["tiers"] if tier["tier"] == "disk"]
    return sum(tier["pages"] for tier in tiers), sum(tier["used_bytes"] for tier in tiers)


def cluster_flags(model: Path, workers: Sequence[str], settings: Mapping[str, str | int]) -> list[str]:
    """workers: flags that tell how many of which role."""
    named = {**settings, "model.served_name": MODEL_NAME}
    return [
        "--model",
        str(model),
        *workers,
        *(word for name, value in named.items() for word in ("--set", f"{name}={value}")),
    ]
