"""Owns the modelled engine: the Engine protocol without a model. Torch-free; a test and benchmark tool, never a product path.

Tokens are a hash of prompt, seed, choice and output index (`simulator.token_draw`), steps last as long as a cost model says
(`simulator.cost_model`), blocks are accounted for as in a real engine (`simulator.block_tables`), and the KV bytes, where wanted, are
a pattern of the tokens, so that a hand-off is checked at Activate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.pool import BlockPool, PoolExhausted
from engine.protocol import (
    Command,
    EngineReady,
    EventSink,
    KvReady,
    Layout,
    Load,
    SetPolicy,
)
from kv_transfer.keys import fingerprint_seed, identity_digest
from pdserve.errors import NoCapacity
from simulator.block_tables import BlockTables
from simulator.command_desk import CommandDesk
from simulator.cost_model import PRESETS, CostModel
from simulator.dispatch_book import DispatchBook
from simulator.dispatch_state import DispatchState, Sequence
from simulator.kv_memory import KvMemory
from simulator.step_plan import StepPlan, plan_step
from simulator.step_tokens import StepDraws
from simulator.token_draw import Vocabulary

_STEP_AVERAGE_WEIGHT = 0.1

VOCABULARY = Vocabulary()
LAYOUT = Layout(
    layers=2,
    blocks=4096,
    page_tokens=16,
    kv_heads=1,
    head_dim=4,
    dtype="float32",
    block_bytes=2 * 16 * 1 * 4 * 4,
)
POLICY = SetPolicy(token_budget=2048, max_running=256, prefill_chunk=512, decode_headroom_blocks=0)


@dataclass(frozen=True, slots=True)
class ModelledConfig:
    """What a modelled engine pretends to be."""

    model: str = "modelled"
    cost: CostModel = PRESETS["instant"]
    vocabulary: Vocabulary = VOCABULARY
    layout: Layout = LAYOUT
    max_context_tokens: int = 131_072
    prefix_reuse: bool = True
    kv_bytes: bool = True  # False: the arena exists but nothing is written to it or checked
    policy: SetPolicy = POLICY


class ModelledEngine:
    """Implements engine.protocol.Engine. `pause` spends the modelled time in `step`; callers with a loop of their own use
    `begin_step` and `phases` instead and spend it as they like."""

    def __init__(
        self,
        config: ModelledConfig,
        sink: EventSink,
        *,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.memory = KvMemory(config.layout)
        self._sink = sink
        self._pause = pause
        self._clock = clock
        layout, written = config.layout, self.memory if config.kv_bytes else None
        self._identity = _identity(config)
        seed = fingerprint_seed(self._identity)
        self._tables = BlockTables(BlockPool(layout.blocks), layout.page_tokens, seed, written, sink)
        self._book = DispatchBook(self._tables, sink)
        self._desk = CommandDesk(self._book, config.vocabulary, config.max_context_tokens, config.policy, sink, clock)
        self._steps = 0
        self._step_ms = 0.0
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def arena_fd(self) -> int:
        return self.memory.fd

    def ready(self) -> EngineReady:
        config = self.config
        return EngineReady(
            config.model,
            self._identity,
            config.layout,
            config.max_context_tokens,
            config.vocabulary.eos_token_ids,
            os.getpid(),
            0.0,
        )

    def handle(self, command: Command) -> None:
        self._desk.handle(command)

    def step(self) -> bool:
        plan = self.begin_step()
        if plan is None:
            return False
        for pause_s in self.phases(plan):
            self._pause(pause_s)
        return True

    def begin_step(self) -> StepPlan | None:
        """Admits what fits and composes the next step. None: nothing to do until the next command."""
        self._admit()
        self._sink.flush()  # as the native engine: who is at work is told before the work
        return plan_step(self._book.sequences(), self._book.in_phase("prefilling"), self._desk.policy, self.config.cost)

    def phases(self, plan: StepPlan) -> Iterator[float]:
        """Runs `plan`: yields seconds to spend, layer by layer where somebody waits for layers, and emits as it goes."""
        layers = self.config.layout.layers
        parts = layers if plan.streams_layers else 1
        announcements = self._compute(plan)
        for layer in range(layers):
            if layer < parts and plan.duration_s > 0:
                yield plan.duration_s / parts
            for state, first, count in announcements:
                self._sink.emit(KvReady(state.work.dispatch, layer, first, count))
        self._finish(plan)
        self._sink.flush()

    def load(self) -> Load:
        book, pool = self._book, self._tables.pool
        states = book.states.values()
        waiting = [state for state in states if state.phase in ("waiting", "prefilling")]
        return Load(
            step=self._steps,
            blocks_total=pool.size,
            blocks_free=pool.available,
            blocks_leaked=self._tables.leaked(table for state in states for table in state.tables()),
            reserved_blocks=sum(len(s.table.blocks) for s in book.in_phase("reserved") if s.table),
            running=sum(len(state.sequences) for state in states),
            waiting=len(waiting),
            waiting_tokens=sum(state.missing_tokens for state in waiting),
            step_ms=self._step_ms,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=0,
            resident_bytes=self.memory.size_bytes,
        )

    def close(self) -> None:
        self.memory.close()

    def _admit(self) -> None:
        for state in self._book.in_phase("waiting"):
            if not self._fits(state):
                break
            work = state.work
            reusable = self.config.prefix_reuse and work.sampling.prompt_logprobs is None
            # The last token is always computed: its logits give the first token.
            state.table = self._tables.open(work, state.token_count - 1 if reusable else 0, spare=0)
            if state.table is None:
                break
            cached = state.table.token_count
            self._prefix_queries += state.token_count
            self._prefix_hits += cached
            self._desk.start(state, cached)
            if state.mode == "prefill":
                self._announce_cached(state)

    def _fits(self, state: DispatchState) -> bool:
        """Whether the growth of running sequences keeps its head-room; an idle engine admits whatever fits at all."""
        if state.mode == "prefill" or not any(True for _ in self._book.sequences()):
            return True
        needed = self._tables.blocks_for(state.token_count)
        return self._tables.pool.available - needed >= self._desk.policy.decode_headroom_blocks

    def _announce_cached(self, state: DispatchState) -> None:
        assert state.table is not None
        state.announced_blocks = state.table.token_count // self._tables.page_tokens
        if state.announced_blocks:
            for layer in range(self.config.layout.layers):
                self._sink.emit(KvReady(state.work.dispatch, layer, 0, state.announced_blocks))

    def _compute(self, plan: StepPlan) -> list[tuple[DispatchState, int, int]]:
        """Writes the KV of the prompts' chunks; gives (dispatch, first block, count) of what is to be announced."""
        announcements: list[tuple[DispatchState, int, int]] = []
        for state, tokens in plan.chunks:
            assert state.table is not None
            start = state.table.token_count
            self._tables.write(state.table, state.work.token_ids[start * 4 : (start + tokens) * 4])
            final = state.table.token_count if state.missing_tokens else None
            done = len(state.table.blocks) if final is None else final // self._tables.page_tokens
            if state.mode == "prefill" and done > state.announced_blocks:
                announcements.append((state, state.announced_blocks, done - state.announced_blocks))
                state.announced_blocks = done
        return announcements

    def _finish(self, plan: StepPlan) -> None:
        self._steps += 1
        step_ms = plan.duration_s * 1e3
        self._step_ms += (step_ms - self._step_ms) * (_STEP_AVERAGE_WEIGHT if self._steps > 1 else 1.0)
        draws = StepDraws(self._steps, self.config.vocabulary, self.config.max_context_tokens)
        for sequence in plan.decodes:
            self._decode(sequence, draws)
        prefilled = [state for state, _ in plan.chunks if not state.missing_tokens]
        for state in prefilled:
            self._desk.prefilled(state, draws)
        draws.emit(self._sink)
        for state in prefilled:
            self._desk.after_first_tokens(state)
        for dispatch in dict.fromkeys(sequence.dispatch for sequence in plan.decodes):
            self._book.settle(dispatch)

    def _decode(self, sequence: Sequence, draws: StepDraws) -> None:
        state = self._book.states[sequence.dispatch]
        try:
            self._tables.grow(sequence.table)
        except PoolExhausted as error:
            self._desk.fail_choice(state, sequence.choice, NoCapacity(f"The KV pool is exhausted: {error}."))
            return
        self._tables.write_token(sequence.table, sequence.token_id.to_bytes(4, "little", signed=True))
        sequence.token_id, goes_on = draws.draw(state.work, sequence.choice, sequence.key, sequence.next_index)
        sequence.next_index += 1
        if not goes_on:
            self._book.end_choice(state, sequence.choice)


def _identity(config: ModelledConfig) -> bytes:
    return identity_digest(
        [
            ("model", config.model),
            ("weights", "modelled"),
            ("kv_dtype", config.layout.dtype),
            ("layers", str(config.layout.layers)),
            ("kv_heads", str(config.layout.kv_heads)),
            ("head_dim", str(config.layout.head_dim)),
        ]
    )
