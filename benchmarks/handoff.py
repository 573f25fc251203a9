"""Hand-off of KV from a prefill worker to a decode worker: GB/s against memcpy, and what of it a request sees.

`python -m benchmarks.handoff [--full] [--threads N]`. Two parts, both through HandoffSender and HandoffReceiver in two processes with
checksums on:

- bytes: KV that lies ready, in one go; the peer is a memcpy of the same bytes in this process, alternating with it;
- overlap: the native engine (100M parameters) computes prompts in a third process, and the KV goes layer by layer as it becomes
  ready, or all of it after the prompt (serialized). "Exposed" is the time from the end of the prompt to activation.
"""

from __future__ import annotations

import random
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.handoff_destination import Setup
from benchmarks.handoff_source import HandoffSource, handoff_source
from benchmarks.native_link import open_native_link
from benchmarks.random_model import LLAMA_100M, write_random_llama
from benchmarks.report import Measurement, Mode, Result, compare, result
from engine.protocol import (
    ClearPrefixCache,
    Dispatch,
    EngineReady,
    KvReady,
    PrefillDone,
    ReleaseSource,
    Sampling,
    Started,
    Submit,
    Work,
    WorkFailed,
)
from kv_transfer.arena import Arena
from kv_transfer.handoff import Handoff, HandoffOutcome
from kv_transfer.keys import chain_hashes
from worker_runtime.engine_link import EngineLink

PAGE_TOKENS = 16
BYTES_TOKENS = (512, 2048, 8192)
OVERLAP_TOKENS = (16, 128, 512, 2048)
TRANSPORTS = ("ucx", "tcp")
KV_BYTES = 416 * 2**20
_GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, 1, 16, 0, True, ())


@dataclass(frozen=True, slots=True)
class Prefilled:
    """One prompt through the engine and over the wire. Seconds."""

    prefill_s: float  # submission to PrefillDone
    compute_s: float  # as the engine says
    outcome: HandoffOutcome | None  # None: nothing was handed off

    @property
    def exposed_s(self) -> float:
        return self.outcome.exposed_us / 1e6 if self.outcome else 0.0


def setup_of(ready: EngineReady) -> Setup:
    """The destination's geometry: that of the engine."""
    shape = ready.layout
    return Setup(
        shape.layers,
        shape.blocks,
        shape.page_tokens,
        shape.kv_heads,
        shape.head_dim,
        shape.dtype,
        shape.block_bytes,
        ready.identity.hex(),
        ready.model,
    )


# ---- bytes


async def push_ready_kv(source: HandoffSource, setup: Setup, tokens: int, transport: str) -> HandoffOutcome:
    """Hands off `tokens` tokens that lie ready in the first blocks of the arena."""
    blocks = tokens // setup.page_tokens
    handoff = await source.begin(tokens, transport)
    handoff.source_blocks(range(blocks))
    for layer in range(setup.layers):
        handoff.kv_ready(layer, 0, blocks)
    handoff.finish([(0, 1)])
    await source.ended()
    outcome = await handoff.outcome()
    if outcome.error is not None:
        raise outcome.error
    return outcome


def memcpy_gb_s(arena: Arena, setup: Setup, tokens: int) -> float:
    """Copies the same bytes within the arena, layer by layer."""
    blocks = tokens // setup.page_tokens
    start_s = time.perf_counter()
    for layer in range(setup.layers):
        arena.blocks(layer, setup.blocks // 2, blocks)[:] = arena.blocks(layer, 0, blocks)
    return setup.layers * blocks * setup.block_bytes / (time.perf_counter() - start_s) / 1e9


async def bytes_part(source: HandoffSource, arena: Arena, setup: Setup, rounds: int) -> list[Measurement]:
    measurements: list[Measurement] = []
    for transport in setup.transports:
        for tokens in (tokens for tokens in BYTES_TOKENS if tokens // setup.page_tokens <= setup.blocks // 2):
            rates: list[float] = []
            copies: list[float] = []
            await push_ready_kv(source, setup, tokens, transport)
            memcpy_gb_s(arena, setup, tokens)
            for _ in range(rounds):
                outcome = await push_ready_kv(source, setup, tokens, transport)
                rates.append(outcome.bytes / outcome.transfer_us / 1e3)
                copies.append(memcpy_gb_s(arena, setup, tokens))
            size_mb = setup.layers * (tokens // setup.page_tokens) * setup.block_bytes / 1e6
            name = f"{transport}: {tokens} tokens ({size_mb:.0f} MB)"
            measurements.append(compare(name, "GB/s", rates, ("memcpy", copies), "higher"))
    return measurements


# ---- overlap


class PrefillRun:
    """Prompts through an engine, one at a time."""

    def __init__(self, link: EngineLink, source: HandoffSource) -> None:
        self._link = link
        self._events = link.events()
        self._source = source
        self._random = random.Random(5)
        self._next_key = 0

    def _work(self, tokens: int) -> Work:
        self._next_key += 1
        prompt = array("i", (self._random.randrange(10, LLAMA_100M.vocab) for _ in range(tokens))).tobytes()
        hashes = chain_hashes(bytes(32), prompt)
        return Work(Dispatch(self._next_key, 1), "benchmark", (0,), prompt, tokens, _GREEDY, hashes)

    async def alone(self, tokens: int) -> Prefilled:
        """Computes a prompt; its KV goes nowhere."""
        work = self._work(tokens)
        start_s = time.perf_counter()
        self._link.send(Submit(work, "prefill"))
        done = await self._until_done([])
        elapsed_s = time.perf_counter() - start_s
        self._release(work)
        return Prefilled(elapsed_s, done.compute_us / 1e6, None)

    async def handed_off(self, tokens: int, transport: str, *, layer_wise: bool) -> Prefilled:
        work = self._work(tokens)
        handoff = await self._source.begin(tokens, transport)
        held: list[KvReady] = []
        start_s = time.perf_counter()
        self._link.send(Submit(work, "prefill"))
        done = await self._until_done(held, handoff, layer_wise=layer_wise)
        elapsed_s = time.perf_counter() - start_s
        for ready in held:
            handoff.kv_ready(ready.layer, ready.first_block, ready.block_count)
        handoff.finish(done.going_on)
        await self._source.ended()
        outcome = await handoff.outcome()
        self._release(work)
        if outcome.error is not None:
            raise outcome.error
        return Prefilled(elapsed_s, done.compute_us / 1e6, outcome)

    async def _until_done(
        self, held: list[KvReady], handoff: Handoff | None = None, *, layer_wise: bool = False
    ) -> PrefillDone:
        """Follows one prompt; KV that is not told to `handoff` at once goes to `held`."""
        async for event in self._events:
            match event:
                case Started() if handoff is not None:
                    handoff.source_blocks(event.blocks)
                case KvReady() if handoff is not None and layer_wise:
                    handoff.kv_ready(event.layer, event.first_block, event.block_count)
                case KvReady():
                    held.append(event)
                case PrefillDone():
                    return event
                case WorkFailed():
                    raise RuntimeError(f"{event.reason}: {event.message}")
                case _:
                    pass
        raise RuntimeError("the engine's events ended")

    def _release(self, work: Work) -> None:
        self._link.send(ReleaseSource(work.dispatch))
        self._link.send(ClearPrefixCache())


async def overlap_part(run: PrefillRun, transports: Sequence[str], rounds: int) -> list[Measurement]:
    measurements: list[Measurement] = []
    for transport in transports:
        for tokens in OVERLAP_TOKENS:
            await run.handed_off(tokens, transport, layer_wise=True)
            alone: list[Prefilled] = []
            streamed: list[Prefilled] = []
            serialized: list[Prefilled] = []
            for _ in range(rounds):
                alone.append(await run.alone(tokens))
                streamed.append(await run.handed_off(tokens, transport, layer_wise=True))
                serialized.append(await run.handed_off(tokens, transport, layer_wise=False))
            measurements += overlap_figures(f"{transport}: {tokens} tokens", alone, streamed, serialized)
    return measurements


def overlap_figures(
    name: str, alone: Sequence[Prefilled], streamed: Sequence[Prefilled], serialized: Sequence[Prefilled]
) -> list[Measurement]:
    exposed_ms = [item.exposed_s * 1e3 for item in streamed]
    late_ms = [item.exposed_s * 1e3 for item in serialized]
    prefill_ms = [item.prefill_s * 1e3 for item in streamed]
    total_ms = [1e3 * (item.prefill_s + item.exposed_s) for item in streamed]
    late_total_ms = [1e3 * (item.prefill_s + item.exposed_s) for item in serialized]
    alone_ms = [item.prefill_s * 1e3 for item in alone]
    share = [100 * item.exposed_s / item.prefill_s for item in streamed]
    late_share = [100 * item.exposed_s / item.prefill_s for item in serialized]
    return [
        compare(f"{name}, exposed, layer-wise", "ms", exposed_ms, ("serialized", late_ms), "lower"),
        compare(f"{name}, exposed share of prefill", "%", share, ("serialized", late_share), "lower"),
        compare(f"{name}, prompt to activation", "ms", total_ms, ("serialized", late_total_ms), "lower"),
        compare(f"{name}, prefill while sending", "ms", prefill_ms, ("without hand-off", alone_ms), "lower"),
    ]


# ---- the run


async def run(mode: Mode, threads: int, transports: Sequence[str] = TRANSPORTS) -> Result:
    rounds = 3 if mode == "quick" else 9
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        link = await open_native_link(write_random_llama(Path(folder)), threads=threads, kv_bytes=KV_BYTES)
        try:
            setup = msgspec.structs.replace(setup_of(link.ready), transports=tuple(transports))
            link.arena.prefault()
            async with handoff_source(setup, link.arena) as source:
                prefills = PrefillRun(link, source)
                measurements = await overlap_part(prefills, transports, rounds)
                measurements += await bytes_part(source, link.arena, setup, rounds * 2)
        finally:
            await link.close()
    copied = [item.peer.figure.median for item in measurements if item.peer and item.peer.name == "memcpy"]
    settings: dict[str, str | int | float | bool] = {
        "model": "random Llama of 100M parameters, fp32: 24,576 bytes of KV per token",
        "threads": threads,
        "checksums": "xxh3_128 on both sides",
    }
    notes = [
        "ratio above 1 = better than the peer; exposed = end of prefill to activation at the destination",
        f"memcpy within one arena moved {min(copied):.1f} to {max(copied):.1f} GB/s" if copied else "no bytes part",
    ]
    return result("handoff", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Hand-off of KV between two processes.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(uvloop.run(run(mode_of(given), given.threads)))


if __name__ == "__main__":
    main()
