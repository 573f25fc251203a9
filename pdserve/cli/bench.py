"""Owns `pdserve bench`: a small closed-loop load, measured where the tokens arrive."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from pdserve.cli.access import Access, post, reaching_grpc
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_OK, Commands, access, command, reaching
from pdserve.cli.terminal import Terminal, seconds
from pdserve.cli.verify_cases import TEXTS
from pdserve.client import AsyncClient, RequestOptions, Sampling, Tls
from pdserve.errors import PdserveError

REQUEST_S = 600.0


@dataclass(slots=True)
class Measured:
    """Of all requests; seconds."""

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # between tokens
    total_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Load:
    concurrency: int
    requests: int
    prompt_tokens: int
    max_tokens: int


def add(commands: Commands) -> None:
    parser = command(commands, "bench", "measure the cluster with a small load", bench)
    reaching(parser)
    parser.add_argument("--concurrency", type=_positive, default=8, metavar="N", help="requests at once")
    parser.add_argument("--requests", type=_positive, default=64, metavar="N", help="requests in all")
    parser.add_argument("--prompt-tokens", type=_positive, default=256, metavar="N")
    parser.add_argument("--max-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")


def bench(options: argparse.Namespace, terminal: Terminal) -> int:
    """Exit status 4 where a request failed."""
    reached = reaching_grpc(access(options))
    load = Load(min(options.concurrency, options.requests), options.requests, options.prompt_tokens, options.max_tokens)
    vocabulary = _vocabulary(reached)
    began_s = time.monotonic()
    measured = asyncio.run(_run(reached, load, vocabulary, Random(options.seed)))
    result = summary(load, measured, time.monotonic() - began_s)
    _show(load, result, terminal)
    for error in measured.errors[:3]:
        terminal.line("fail", "request", error)
    terminal.result(result)
    return EXIT_CHECK_FAILED if measured.errors else EXIT_OK


def summary(load: Load, measured: Measured, wall_s: float) -> dict[str, object]:
    done = len(measured.total_s)
    return {
        "concurrency": load.concurrency,
        "prompt_tokens": load.prompt_tokens,
        "max_tokens": load.max_tokens,
        "requests": done,
        "errors": len(measured.errors),
        "wall_s": round(wall_s, 4),
        "requests_per_s": round(done / wall_s, 3),
        "tokens_per_s": round(measured.tokens / wall_s, 2),
        **_percentiles("ttft_s", measured.ttft_s),
        **_percentiles("itl_s", measured.gaps_s),
        **_percentiles("e2e_s", measured.total_s),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50": round(percentile(values, 0.5), 6), f"{name}_p99": round(percentile(values, 0.99), 6)}


def _show(load: Load, result: dict[str, object], terminal: Terminal) -> None:
    terminal.say(
        f"{result['requests']} requests of {load.prompt_tokens} + {load.max_tokens} tokens, {load.concurrency} at once: "
        f"{result['tokens_per_s']} tok/s, {result['requests_per_s']} requests/s"
    )
    rows = []
    for name, label in (("ttft_s", "TTFT"), ("itl_s", "ITL"), ("e2e_s", "END TO END")):
        p50, p99 = (float(str(result[f"{name}_{rank}"])) for rank in ("p50", "p99"))
        rows.append((label, seconds(p50), seconds(p99)))
    terminal.table(("", "P50", "P99"), rows)


def _vocabulary(reached: Access) -> list[int]:
    with reached.http(30.0) as http:
        answers = [post(http, "/tokenize", {"prompt": text}) for text in TEXTS]
    return sorted({int(token) for answer in answers for token in answer.texts("tokens")})


async def _run(reached: Access, load: Load, vocabulary: Sequence[int], rng: Random) -> Measured:
    measured = Measured()
    prompts = iter([rng.choices(vocabulary, k=load.prompt_tokens) for _ in range(load.requests)])
    tls = Tls(ca=reached.trusted_pem) if reached.api_url.startswith("https") else None
    async with AsyncClient(reached.grpc_address, reached.api_key, tls) as client, asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(_user(client, prompts, load, measured))
    return measured


async def _user(client: AsyncClient, prompts: Iterator[list[int]], load: Load, measured: Measured) -> None:
    """Sends one request after the other until none is left."""
    sampling = Sampling(load.max_tokens, temperature=0.0, ignore_eos=True)
    options = RequestOptions(token_ids_only=True)
    for prompt in prompts:
        began_s = last_s = time.monotonic()
        first = True
        try:
            async for delta in client.generate(prompt, sampling, timeout_s=REQUEST_S, options=options):
                now_s = time.monotonic()
                if not delta.token_ids:
                    continue
                if first:
                    measured.ttft_s.append(now_s - began_s)
                else:
                    measured.gaps_s += [(now_s - last_s) / len(delta.token_ids)] * len(delta.token_ids)
                measured.tokens += len(delta.token_ids)
                first, last_s = False, now_s
        except PdserveError as error:
            measured.errors.append(f"{error.reason}: {error.message}")
            continue
        measured.total_s.append(time.monotonic() - began_s)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
