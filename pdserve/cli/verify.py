"""Owns `pdserve verify`: the same prompts through prefill/decode pairs and through one worker alone give the same tokens."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypedDict

import httpx

from pdserve.cli.access import Access, get, post, reaching_grpc
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_OK, Commands, access, command, reaching
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, seconds, size
from pdserve.cli.verify_blend import add_blend_options, verify_blend
from pdserve.cli.verify_cases import TEXTS, Case, cases
from pdserve.cli.verify_compare import compare
from pdserve.client import AsyncClient, Generation, RequestOptions, Route, Tls
from pdserve.errors import NotFound, PdserveError, Unavailable

TOLERANCE = 1e-3
CONCURRENT = 4
REQUEST_S = 300.0
TRANSPORTS = ("ucx", "nixl", "tcp", "inproc")


@dataclass(frozen=True, slots=True)
class Path:
    """A route under test; the reference has no prefill worker."""

    route: Route

    @property
    def name(self) -> str:
        route = self.route
        if not route.prefill_worker:
            return f"{route.decode_worker} alone"
        return f"{route.prefill_worker} → {route.decode_worker} over {route.transport}"


@dataclass(slots=True)
class Verdict:
    """Of one path and one way to sample."""

    path: str
    mode: str
    requests: int = 0
    tokens: int = 0
    kv_bytes: int = 0
    logprob_error: float = 0.0
    differences: list[str] = field(default_factory=list)


class Totals(TypedDict):
    """Of all paths, as `verify -o json` gives it."""

    transports: list[str]
    requests: int
    tokens: int
    max_logprob_difference: float


def add(commands: Commands) -> None:
    parser = command(commands, "verify", "compare prefill/decode pairs with one undisaggregated worker", verify)
    reaching(parser)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="X", help="of log-probabilities")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="output tokens of each request")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="prefill/decode pairs per transport")
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="", help="this one only (default: all that workers offer)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random prompts")
    add_blend_options(parser)


def verify(options: argparse.Namespace, terminal: Terminal) -> int:
    if options.blend:
        return verify_blend(options, terminal)
    began_s = time.monotonic()
    reached = reaching_grpc(access(options))
    with reached.http(REQUEST_S) as http:
        status = get(http, "/api/v1/status")
        reference, paths = plan(status, options.transport, options.pairs)
        planned = _cases(http, options.max_tokens, Random(options.seed))
        terminal.say(f"{len(planned)} requests per route; reference: {reference.name}; greedy and seeded, n=1 and n=3")
        verdicts = asyncio.run(_Verification(reached, http, options).run(reference, paths, planned, terminal))
    failed = [verdict for verdict in verdicts if verdict.differences]
    _show(verdicts, options.tolerance, time.monotonic() - began_s, terminal)
    totals = _totals(paths, verdicts)
    terminal.result(
        {
            "equal": not failed,
            "tolerance": options.tolerance,
            "reference": reference.name,
            **totals,
            "routes": [_plain(verdict) for verdict in verdicts],
        }
    )
    if failed:
        terminal.say(f"NOT EQUAL: {failed[0].differences[0]}. See: pdserve explain REQUEST")
        return EXIT_CHECK_FAILED
    terminal.say(
        f"Equal: {totals['tokens']} token ids of {totals['requests']} requests over {' and '.join(totals['transports'])}; "
        f"largest difference of a log-probability {totals['max_logprob_difference']:.1e}, allowed {options.tolerance:g}."
    )
    return EXIT_OK


def plan(status: Record, transport: str, pairs: int) -> tuple[Path, list[Path]]:
    """The reference, and up to `pairs` pairs per transport. Raises Unavailable where the cluster cannot be compared."""
    ready = [row for row in status.records("workers") if row.text("state") == "READY"]
    prefill = [row for row in ready if "prefill" in row.texts("roles")]
    decode = [row for row in ready if "decode" in row.texts("roles")]
    if not decode:
        raise Unavailable("No decode worker is ready. See: pdserve status")
    found = [
        Path(Route(one.text("id"), other.text("id"), name))
        for name in (TRANSPORTS if not transport else (transport,))
        for one, other in itertools.islice(
            (pair for pair in _pairs(prefill, decode) if name in _offered(pair[0]) & _offered(pair[1])), pairs
        )
    ]
    if not found:
        raise Unavailable(
            f"No prefill/decode pair offers {transport or 'a transport'}. Two workers are needed: pdserve up"
        )
    return Path(Route("", decode[0].text("id"))), found


def _pairs(prefill: Sequence[Record], decode: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """All pairs of two workers; the first ones have as many different workers as there are."""
    for shift in range(len(decode)):
        for number, one in enumerate(prefill):
            other = decode[(number + shift) % len(decode)]
            if one.text("id") != other.text("id"):
                yield one, other


def _offered(row: Record) -> set[str]:
    return {endpoint.text("transport") for endpoint in row.records("kv_endpoints")}


def _cases(http: httpx.Client, max_tokens: int, rng: Random) -> list[Case]:
    answers = [post(http, "/tokenize", {"prompt": text}) for text in TEXTS]
    texts = [[int(token) for token in answer.texts("tokens")] for answer in answers]
    return cases(texts, answers[0].integer("max_model_len") - max_tokens, rng)


class _Verification:
    """Sends the cases of a path; remembers the reference's answers."""

    def __init__(self, reached: Access, http: httpx.Client, options: argparse.Namespace) -> None:
        self._reached = reached
        self._http = http
        self._max_tokens: int = options.max_tokens
        self._tolerance: float = options.tolerance
        self._gate = asyncio.Semaphore(CONCURRENT)
        self._run_id = secrets.token_hex(4)

    async def run(
        self, reference: Path, paths: Sequence[Path], planned: Sequence[Case], terminal: Terminal
    ) -> list[Verdict]:
        """Raises the error of the reference; errors of a path are differences."""
        reached = self._reached
        tls = Tls(ca=reached.trusted_pem) if reached.api_url.startswith("https") else None
        verdicts: dict[tuple[str, str], Verdict] = {}
        async with AsyncClient(reached.grpc_address, reached.api_key, tls) as client:
            expected = await asyncio.gather(*(self._generate(client, reference, 0, case) for case in planned))
            terminal.progress("ok", "reference", f"{len(planned)} requests to {reference.name}")
            for number, path in enumerate(paths, 1):
                began_s = time.monotonic()
                await asyncio.gather(
                    *(
                        self._judge(client, path, number, case, wanted, _verdict(verdicts, path, case))
                        for case, wanted in zip(planned, expected, strict=True)
                    )
                )
                bad = any(verdict.differences for verdict in verdicts.values() if verdict.path == path.name)
                terminal.progress(
                    "fail" if bad else "ok", "route", f"{path.name} in {seconds(time.monotonic() - began_s)}"
                )
        return list(verdicts.values())

    async def _judge(
        self, client: AsyncClient, path: Path, number: int, case: Case, wanted: Generation, verdict: Verdict
    ) -> None:
        verdict.requests += 1
        try:
            got = await self._generate(client, path, number, case)
            kv_bytes, detour = await asyncio.to_thread(self._handed_over, got.request_id, path.route)
        except PdserveError as error:
            verdict.differences.append(f"{path.name}, {case.name}, {case.mode.name}: {error.reason}: {error.message}")
            return
        compared = compare(wanted, got, self._tolerance)
        verdict.tokens += compared.tokens
        verdict.kv_bytes += kv_bytes
        verdict.logprob_error = max(verdict.logprob_error, compared.logprob_error)
        for difference in (compared.difference, detour):
            if difference:
                verdict.differences.append(
                    f"{path.name}, {case.name}, {case.mode.name}: {difference} (request {got.request_id})"
                )

    async def _generate(self, client: AsyncClient, path: Path, number: int, case: Case) -> Generation:
        """Every path has a salt of its own: no route may live on the prefix cache that another one filled."""
        options = RequestOptions(
            f"verify-{self._run_id}-{number}-{secrets.token_hex(4)}",
            cache_salt=f"verify-{self._run_id}-{number}-{case.mode.name}",
            route=path.route,
        )
        async with self._gate:
            sampling = case.mode.sampling(self._max_tokens)
            stream = client.generate(case.prompt, sampling, case.mode.n, timeout_s=REQUEST_S, options=options)
            async with stream:
                return await stream.result()

    def _handed_over(self, request_id: str, route: Route) -> tuple[int, str]:
        """KV bytes, and what was not as the route wanted it: equal tokens prove nothing if no KV moved."""
        try:
            attempts = get(self._http, f"/api/v1/requests/{request_id}").records("attempts")
        except NotFound:
            return 0, "no timeline is kept of it, so the hand-off cannot be told"
        if len(attempts) != 1:
            return 0, f"took {len(attempts)} attempts"
        one = attempts[0]
        taken = (one.text("prefill_worker"), one.text("decode_worker"), one.text("transport"))
        if one.text("kind") != "split" or taken != (route.prefill_worker, route.decode_worker, route.transport):
            return 0, f"went {' '.join(taken)} instead"
        return one.integer("kv_bytes"), ""


def _verdict(verdicts: dict[tuple[str, str], Verdict], path: Path, case: Case) -> Verdict:
    return verdicts.setdefault((path.name, case.mode.name), Verdict(path.name, case.mode.name))


def _show(verdicts: Sequence[Verdict], tolerance: float, total_s: float, terminal: Terminal) -> None:
    terminal.say()
    rows = [
        (
            one.path, one.mode, str(one.requests), str(one.tokens), size(one.kv_bytes), f"{one.logprob_error:.1e}",
            "equal" if not one.differences else f"{len(one.differences)} DIFFER",
        )
        for one in verdicts
    ]  # fmt: skip
    terminal.table(("ROUTE", "SAMPLING", "REQUESTS", "TOKENS", "KV MOVED", "MAX LOGPROB DIFF", "VERDICT"), rows)
    terminal.say(f"Token ids must be equal, log-probabilities within {tolerance:g}. {total_s:.1f} s")


def _totals(paths: Sequence[Path], verdicts: Sequence[Verdict]) -> Totals:
    return {
        "transports": sorted({path.route.transport for path in paths}),
        "requests": sum(one.requests for one in verdicts),
        "tokens": sum(one.tokens for one in verdicts),
        "max_logprob_difference": max((one.logprob_error for one in verdicts), default=0.0),
    }


def _plain(verdict: Verdict) -> dict[str, object]:
    return {
        "route": verdict.path,
        "sampling": verdict.mode,
        "requests": verdict.requests,
        "tokens": verdict.tokens,
        "kv_bytes": verdict.kv_bytes,
        "max_logprob_difference": verdict.logprob_error,
        "differences": verdict.differences[:20],
    }
