"""Owns `pdserve verify --blend`: whether a model answers nearly as with full prefill where the KV of chunks is blended."""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from pdserve.cli.access import Access, get, post, reaching_grpc
from pdserve.cli.blend_cases import BlendCase, built_in_cases, cases_of_lines
from pdserve.cli.blend_delivery import TRY_S, deliver
from pdserve.cli.blend_quality import Compared, Limits, Quality, kl_nats
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_FAILED, EXIT_OK, access
from pdserve.cli.terminal import Terminal
from pdserve.client import AsyncClient, Generation, KvBlend, RequestOptions, Sampling, Tls
from pdserve.errors import InvalidRequest, PdserveError

BLEND_PATH = "/api/v1/kv/blend"
CONCURRENT = 4
REQUEST_S = 300.0
TOP_LOGPROBS = 20
OUTPUT_TOKENS = 1
SHOWN_ROWS = 10
MEAN_KL_NATS = 0.05
MAX_KL_NATS = 1.0
AGREEMENT = 0.95


def add_blend_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--blend", "full prefill against KV blended from chunks (docs/blend.md)")
    group.add_argument("--blend", action="store_true", help="check this instead; needs controller.kv_blend: verified")
    group.add_argument("--method", choices=("blend", "epic"), default="blend", help="CacheBlend or EPIC")
    group.add_argument("--ratio", type=float, default=0.15, metavar="X", help="blend: share computed anew")
    group.add_argument("--first-tokens", type=int, default=32, metavar="N", help="epic: tokens of each chunk")
    group.add_argument(
        "--prompts", type=Path, default=None, metavar="FILE", help="JSONL: token_ids and chunks per line"
    )
    group.add_argument("--count", type=int, default=32, metavar="N", help="built-in prompts, without --prompts")
    group.add_argument("--mean-kl", type=float, default=MEAN_KL_NATS, metavar="X", help="allowed, in nats")
    group.add_argument("--max-kl", type=float, default=MAX_KL_NATS, metavar="X", help="allowed for one prompt, in nats")
    group.add_argument("--agreement", type=float, default=AGREEMENT, metavar="X", help="of the likeliest token, needed")


def verify_blend(options: argparse.Namespace, terminal: Terminal) -> int:
    if options.count < 1:
        raise InvalidRequest("--count must be at least 1.")
    limits = _limits(options)
    reached = reaching_grpc(access(options))
    with reached.http(REQUEST_S) as http:
        status = get(http, "/api/v1/status")
        model, setting = status.text("model"), status.record("kv_blend").text("setting")
        cases = _cases(http, options)
        trial = post(http, f"{BLEND_PATH}/trials", {}).text("cache_salt")
    terminal.say(f"{len(cases)} prompts, each with full prefill and with {_recipe(options)}")
    pairs = asyncio.run(_Comparison(reached, options, trial).run(cases))
    rows = [row for row, _ in pairs]
    blended = [row for row in rows if row.blended_tokens]
    if not blended:
        raise InvalidRequest(
            "No prompt was blended: the chunks are too short, hold too little of the prompts, or the recipe computes nearly "
            "everything. Give longer chunks (--prompts) or a smaller --ratio."
        )
    quality, naive = Quality.of(blended), Quality.of([row for _, row in pairs])
    found = Found(model, setting, tuple(rows), quality, naive, limits)
    verdict = _verdict(trial, options, quality, quality.failures(limits))

    def send() -> None:
        with reached.http(TRY_S) as http:
            post(http, f"{BLEND_PATH}/verdicts", verdict)

    return conclude(found, options, terminal, lambda: deliver(send))


def _limits(options: argparse.Namespace) -> Limits:
    """Raises InvalidRequest. What is not a number, or infinite, is no limit, and no JSON that the controller takes."""
    for flag, value in (
        ("--mean-kl", options.mean_kl),
        ("--max-kl", options.max_kl),
        ("--agreement", options.agreement),
    ):
        if not math.isfinite(value):
            raise InvalidRequest(f"{flag} must be a finite number, not {value:g}.")
    return Limits(options.mean_kl, options.max_kl, options.agreement)


@dataclass(frozen=True, slots=True)
class Found:
    """What a check measured, and where. naive: with the chunks taken as they are."""

    model: str
    setting: str
    rows: tuple[Compared, ...]
    quality: Quality
    naive: Quality
    limits: Limits


def conclude(
    found: Found, options: argparse.Namespace, terminal: Terminal, hand_over: Callable[[], PdserveError | None]
) -> int:
    """The exit status. Tells the result before it hands the verdict over: minutes of requests are not lost with the controller, and
    a failed check stays one. A pass that the controller does not know of opens nothing, so that it is no success."""
    status = _tell(found, options, terminal)
    error = hand_over()
    if error is None:
        return status
    terminal.progress(
        "fail", "verdict",
        f"NOT DELIVERED ({error.message}). The controller goes by the one that `pdserve status` shows, if any: "
        "run the check again once it answers",
    )  # fmt: skip
    return status or EXIT_FAILED


def _tell(found: Found, options: argparse.Namespace, terminal: Terminal) -> int:
    model, failures = found.model, found.quality.failures(found.limits)
    _show(found.rows, found.quality, found.naive, terminal)
    plain = _plain(model, options, found.rows, found.quality, failures)
    terminal.result({**plain, "naive_reuse": _figures(found.naive)})
    if failures:
        terminal.say(f"FAILED: {model} must not be served with kv_blend: {'; '.join(failures)}.")
        if found.setting == "on":
            terminal.say(
                "It still is: `controller.kv_blend` is `on`. With `verified` the controller would refuse it now."
            )
        return EXIT_CHECK_FAILED
    if not found.naive.failures(found.limits):
        terminal.say(
            "These prompts prove little: chunks taken as they are would pass too. Give prompts that need theirs: --prompts FILE"
        )
    terminal.say(f"Passed: {model} may be served with kv_blend for prompts like these ({_recipe(options)}).")
    return EXIT_OK


def _cases(http: httpx.Client, options: argparse.Namespace) -> list[BlendCase]:
    if options.prompts is not None:
        try:
            with options.prompts.open(encoding="utf-8") as lines:
                return cases_of_lines(lines, options.prompts.name)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{options.prompts} cannot be read: {error}") from error

    def tokenize(text: str) -> list[int]:
        body: dict[str, object] = {"prompt": text, "add_special_tokens": False}
        return [int(token) for token in post(http, "/tokenize", body).texts("tokens")]

    limit = post(http, "/tokenize", {"prompt": "a"}).integer("max_model_len") - OUTPUT_TOKENS
    return built_in_cases(options.count, limit, tokenize, Random(options.seed))


class _Comparison:
    """`trial`: the cache salt with which the controller lets the check's requests through, whatever it refuses others."""

    def __init__(self, reached: Access, options: argparse.Namespace, trial: str) -> None:
        self._reached = reached
        self._options = options
        self._trial = trial
        self._gate = asyncio.Semaphore(CONCURRENT)

    async def run(self, cases: Sequence[BlendCase]) -> list[tuple[Compared, Compared]]:
        """By the recipe, and by naive reuse, which tells whether the prompts feel it. Raises the first error of a request."""
        reached = self._reached
        tls = Tls(ca=reached.trusted_pem) if reached.api_url.startswith("https") else None
        async with AsyncClient(reached.grpc_address, reached.api_key, tls) as client:
            return list(await asyncio.gather(*(self._compare(client, case) for case in cases)))

    async def _compare(self, client: AsyncClient, case: BlendCase) -> tuple[Compared, Compared]:
        options = self._options
        asked = KvBlend(case.chunks, method=options.method, ratio=options.ratio, first_tokens=options.first_tokens)
        async with self._gate:
            full = await self._generate(client, case, None)
            blended = await self._generate(client, case, asked)
            naive = await self._generate(client, case, KvBlend(case.chunks, method="epic", first_tokens=0))
        return _compared(case, full, blended), _compared(case, full, naive)

    async def _generate(self, client: AsyncClient, case: BlendCase, blend: KvBlend | None) -> Generation:
        options = RequestOptions(cache_salt=self._trial, kv_blend=blend)
        sampling = Sampling(OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=TOP_LOGPROBS)
        stream = client.generate(case.token_ids, sampling, timeout_s=REQUEST_S, options=options)
        async with stream:
            return await stream.result()


def _compared(case: BlendCase, full: Generation, blended: Generation) -> Compared:
    one, other = full.choices[0], blended.choices[0]
    return Compared(
        case.name,
        len(case.token_ids),
        blended.usage.blended_tokens,
        kl_nats(one.logprobs[0], other.logprobs[0]),
        one.token_ids[0] == other.token_ids[0],
    )


def _recipe(options: argparse.Namespace) -> str:
    if options.method == "epic":
        return f"EPIC, the first {options.first_tokens} tokens of each chunk computed anew"
    return f"CacheBlend, {options.ratio:.0%} of the chunks' tokens computed anew"


def _show(rows: Sequence[Compared], quality: Quality, naive: Quality, terminal: Terminal) -> None:
    terminal.say()
    worst = sorted(rows, key=lambda row: row.kl, reverse=True)[:SHOWN_ROWS]
    terminal.table(
        ("PROMPT", "TOKENS", "BLENDED", "KL (NATS)", "TOP-1"),
        [
            (row.name, str(row.tokens), str(row.blended_tokens), f"{row.kl:.2e}", "same" if row.agrees else "DIFFERS")
            for row in worst
        ],
    )
    if len(rows) > len(worst):
        terminal.say(f"the {len(worst)} worst of {len(rows)}")
    terminal.say(
        f"{quality.prompts} blended: mean KL {quality.mean_kl:.2e}, largest {quality.max_kl:.2e} nats (of the next token, over the "
        f"{TOP_LOGPROBS} likeliest tokens, the rest as one: a lower estimate); top-1 agreement {quality.agreement:.1%}"
    )
    terminal.say(
        f"chunks taken as they are, for comparison: mean KL {naive.mean_kl:.2e}, largest {naive.max_kl:.2e} nats, top-1 agreement "
        f"{naive.agreement:.1%}"
    )


def _plain(
    model: str, options: argparse.Namespace, rows: Sequence[Compared], quality: Quality, failures: Sequence[str]
) -> dict[str, object]:
    return {
        "passed": not failures,
        "model": model,
        "method": options.method,
        "ratio": options.ratio,
        "first_tokens": options.first_tokens,
        "prompts": len(rows),
        "blended_prompts": quality.prompts,
        "blended_tokens": sum(row.blended_tokens for row in rows),
        "prompt_tokens": sum(row.tokens for row in rows),
        **_figures(quality),
        "allowed": _allowed(options),
        "failures": list(failures),
    }


def _verdict(trial: str, options: argparse.Namespace, quality: Quality, failures: Sequence[str]) -> dict[str, object]:
    return {
        "trial": trial,
        "method": options.method,
        "ratio": options.ratio,
        "first_tokens": options.first_tokens,
        "blended_prompts": quality.prompts,
        "figures": _figures(quality),
        "allowed": _allowed(options),
        "failures": list(failures),
    }


def _allowed(options: argparse.Namespace) -> dict[str, object]:
    return {"mean_kl_nats": options.mean_kl, "max_kl_nats": options.max_kl, "top1_agreement": options.agreement}


def _figures(quality: Quality) -> dict[str, object]:
    return {
        "mean_kl_nats": quality.mean_kl,
        "max_kl_nats": quality.max_kl,
        "top1_agreement": quality.agreement,
    }
