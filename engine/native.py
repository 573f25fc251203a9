"""Owns the native engine: the decoder over a paged KV pool, stepped by the schedule, behind the Engine protocol."""

from __future__ import annotations

import os
import time
from typing import assert_never

import torch

from engine.announcements import Announcement, Announcer
from engine.attention_cost import SHIPPED
from engine.attention_fit import KvShape, fitted_costs
from engine.blend_chunks import BlendChunks
from engine.blend_jobs import BlendJobs
from engine.block_tables import BlockCopy, BlockTables
from engine.cuda_graphs import cuda_graphs
from engine.cuda_streams import prompt_lane
from engine.cuda_varlen import Geometry, device_attention
from engine.dispatch_desk import DispatchDesk
from engine.flight import Computed, Flight, Flights, Lane
from engine.forward import ForwardPass
from engine.kernel_attention import KernelAttention
from engine.kv_exchange import KvExchange
from engine.kv_memory import KvMemory, copy_blocks
from engine.loaded_model import LoadedModel, load_model
from engine.outcomes import Outcomes
from engine.page_protocol import LoadPages, OfferPages, PagesLate, PagesLoaded, PagesSaved
from engine.paged_attention import PagedAttention
from engine.pool import BlockPool
from engine.pool_size import resident_bytes
from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Command,
    EngineReady,
    EventSink,
    Load,
    ReleaseSource,
    ReserveBlocks,
    SetPolicy,
    Started,
    Stop,
    Submit,
    WriterDone,
)
from engine.refusals import Doorkeeper
from engine.schedule import Part, Schedule
from engine.sequences import Sequence
from engine.step_batch import StepBatch, StepBuffers
from engine.token_growth import token_growth
from engine.torch_attention import TorchAttention
from kv_transfer.keys import fingerprint_seed
from pdserve.errors import NoCapacity
from service_kit.config import EngineConfig, ModelConfig

_AVERAGE_WEIGHT = 0.1  # of a step in the running average of step times
_LEAST_PROMPT_TOKENS = 64  # in a step whose time tells how fast prompts are computed
_AUDIT_INTERVAL_S = 0.25


class NativeEngine:
    """Implements engine.protocol.Engine. One thread calls it; `handle` and `step` never wait for anybody."""

    def __init__(
        self, model: LoadedModel, memory: KvMemory, engine: EngineConfig, sink: EventSink, lane: Lane | None = None
    ) -> None:
        """lane: where prompts are computed beside the decodes; None: in one batch with them."""
        layout = model.layout
        self._model = model
        self._memory = memory
        self._sink = sink
        self._tables = BlockTables(BlockPool(layout.blocks), layout.page_tokens)
        self._schedule = Schedule(self._tables, policy_of(engine, layout.blocks), prefix_reuse=engine.prefix_reuse)
        doorkeeper = Doorkeeper(model.max_context_tokens, layout.page_tokens, layout.blocks, model.spec.vocab)
        seed = fingerprint_seed(model.identity)
        self._desk = DispatchDesk(self._tables, self._schedule, doorkeeper, sink, time.monotonic, seed)
        self._exchange = KvExchange(self._tables, memory, model.spec.layers, seed, sink)
        chunks = BlendChunks(model, memory, self._tables, self._exchange.loads, seed)
        self._blends = BlendJobs(model, memory, chunks)
        attention = _attention(model, memory, engine)
        graphs = cuda_graphs(model.decoder) if engine.cuda_graphs else None
        self._forward = ForwardPass(model.decoder, attention, graphs)
        self._buffers = StepBuffers(layout.page_tokens, model.device)
        self._aloft = ForwardPass(model.decoder, attention)  # the buffers, of graphs too, belong to the decodes
        self._aloft_buffers = StepBuffers(layout.page_tokens, model.device)
        self._flights = Flights(lane, self._schedule)
        self._announcer = Announcer(self._tables, memory, model.spec.layers, sink)
        self._outcomes = Outcomes(model, self._tables, self._desk, sink)
        self._steps = 0
        self._step_ms = 0.0
        self._prefill_token_us = 0.0
        self._leaked = 0
        self._audit_due_s = 0.0

    @classmethod
    def open(cls, model: ModelConfig, engine: EngineConfig, sink: EventSink) -> NativeEngine:
        """Loads the checkpoint and allocates the pool. Raises ConfigInvalid or ModelUnsupported."""
        loaded, memory = load_model(model, engine)
        return cls(loaded, memory, engine, sink, prompt_lane(loaded, engine))

    @property
    def arena_fd(self) -> int:
        return self._memory.fd

    def ready(self) -> EngineReady:
        model = self._model
        return EngineReady(
            model.name,
            model.identity,
            model.layout,
            model.max_context_tokens,
            model.spec.eos_token_ids,
            os.getpid(),
            model.load_seconds,
            token_growth(model.spec),
        )

    def close(self) -> None:
        self._flights.close()
        self._memory.close()

    # ---- Engine

    def handle(self, command: Command) -> None:
        if self._flights.postpones(command):
            return
        match command:
            case Submit():
                self._desk.submit(command)
            case ReserveBlocks():
                self._desk.reserve(command)
            case Activate():
                self._desk.activate(command, self._memory.absorb)
            case Cancel():
                self._desk.cancel(command)
            case WriterDone() | ReleaseSource():
                self._desk.peer_done(command.dispatch)
            case SetPolicy():
                self._schedule.policy = command
            case ClearPrefixCache():
                self._tables.clear_cached()
            case OfferPages() | PagesSaved() | LoadPages() | PagesLoaded() | PagesLate():
                self._exchange.handle(command, self._schedule.policy.decode_headroom_blocks)
            case Stop():
                pass
            case _:
                assert_never(command)
        self._exchange.tell()

    @torch.inference_mode()
    def step(self) -> bool:
        landed = self._flights.ended()
        if landed:
            self._land()
        plan = self._schedule.plan()
        for sequence in plan.failed:
            self._desk.fail(sequence, NoCapacity("The request alone needs more KV blocks than the pool has."))
        for sequence in plan.admitted:
            self._start(sequence)
        if plan.admitted:
            self._sink.flush()  # before it is computed: should it end this process, it is known who was at work
        blending = not self._flights.in_air and self._blend()
        start_s = time.perf_counter()
        staying = self._take_off(plan.parts)
        if staying:
            self._compute(staying, plan.copies)
        elif self._flights.in_air:
            self._land()  # nothing else is left to do meanwhile
            self._measure_step(_since_ms(start_s))
            landed = True
        else:
            self._memory.settle()  # nothing is left to copy beside
        self._exchange.tell()
        self._sink.flush()
        storing = self._tables.store_some()  # after the tokens are out
        self._exchange.tell()
        return not plan.empty or bool(plan.admitted) or blending or landed or storing

    def load(self) -> Load:
        schedule, pool = self._schedule, self._tables.pool
        prompts = [sequence for sequence in schedule.running if not sequence.decodes]
        return Load(
            step=self._steps,
            blocks_total=pool.size,
            blocks_free=pool.available,
            blocks_leaked=self._audited(),
            reserved_blocks=self._desk.reserved_blocks,
            running=len(schedule.running),
            waiting=len(schedule.waiting),
            waiting_tokens=sum(sequence.missing for sequence in (*schedule.waiting, *prompts)),
            step_ms=self._step_ms,
            prefix_queries=schedule.prefix_queries,
            prefix_hits=schedule.prefix_hits,
            preemptions=schedule.preemptions,
            resident_bytes=resident_bytes(),
            pinned_bytes=self._memory.pinned_bytes,
            prefill_token_us=self._prefill_token_us,
            key_collisions=self._tables.key_collisions,
        )

    def _audited(self) -> int:
        """Leaked blocks. The audit walks all tables, so it is not made for every answer to a reservation."""
        now_s = time.monotonic()
        if now_s >= self._audit_due_s:
            self._leaked = self._tables.leaked(
                [*self._desk.held_tables(), *self._exchange.held_tables(), *self._blends.held_tables()]
            )
            self._audit_due_s = now_s + _AUDIT_INTERVAL_S
        return self._leaked

    # ---- one step

    def _start(self, sequence: Sequence) -> None:
        state, table = sequence.state, sequence.table
        assert table is not None
        blended = 0
        if sequence.blends:
            blended = self._blends.admit(sequence, self._schedule.policy.decode_headroom_blocks)
        if not state.started:
            state.started_s = time.monotonic()
            queue_us = int((state.started_s - state.submitted_s) * 1e6)
            self._sink.emit(Started(state.dispatch, tuple(table.blocks), sequence.computed, queue_us, blended))
        self._announcer.tell_cached(sequence)

    def _blend(self) -> bool:
        """One piece of a blend in progress, if one has anything to do; a sequence whose blend is done is in the next plan."""
        waiting = self._blends.busy
        blending = self._blends.advance(self._announcer.tell_blended)
        self._steps += waiting  # neither a blend nor its wait for pages is a hang
        return blending

    def _compute(self, parts: list[Part], copies: list[BlockCopy]) -> None:
        start_s = time.perf_counter()
        copy_blocks(self._memory.pool, copies)
        computed = self._computed(self._forward, self._buffers.build(parts), self._announcer.of(parts))
        self._follow(computed)
        step_ms = _since_ms(start_s)
        self._measure_step(step_ms)
        self._measure_prompts(step_ms, sum(part.count for part in parts if part.count > 1))

    def _computed(self, forward: ForwardPass, batch: StepBatch, announcements: list[Announcement]) -> Computed:
        return Computed(batch, forward.run(batch, lambda layer: self._announcer.tell(layer, announcements)))

    def _follow(self, computed: Computed) -> None:
        self._outcomes.score_prompts(computed.batch, computed.hidden)
        if self._flights.in_air:
            self._memory.look()  # of the parts that stay nothing was announced, and what is in the air is not freed
        else:
            self._memory.settle()  # before anything that frees blocks, and before PrefillDone
        self._outcomes.follow(computed.batch, computed.hidden, self._steps + 1)
        self._steps += 1

    def _measure_step(self, step_ms: float) -> None:
        self._step_ms += (step_ms - self._step_ms) * (_AVERAGE_WEIGHT if self._step_ms else 1.0)

    def _measure_prompts(self, taken_ms: float, prompt_tokens: int) -> None:
        if prompt_tokens >= _LEAST_PROMPT_TOKENS:
            token_us, known_us = taken_ms * 1e3 / prompt_tokens, self._prefill_token_us
            self._prefill_token_us += (token_us - known_us) * (_AVERAGE_WEIGHT if known_us else 1.0)

    # ---- prompts on a lane of their own

    def _take_off(self, parts: list[Part]) -> list[Part]:
        """Launches prompts. Returns the parts that stay: all, while a blend is in progress, which is settled step by step."""
        boarding = self._flights.boarding(parts)
        if not boarding or self._blends.busy:
            return parts
        self._memory.settle()  # from here to the landing only what the flight makes is announced
        announcements = self._announcer.of(boarding)
        self._flights.take_off(
            boarding, lambda: self._computed(self._aloft, self._aloft_buffers.build(boarding), announcements)
        )
        return [part for part in parts if part.sequence.decodes]

    def _land(self) -> None:
        self._memory.settle()  # tells layers as they end, where the flight has to be waited for
        self._flights.land(self._landed)

    def _landed(self, flight: Flight, computed: Computed) -> None:
        self._memory.settle()
        for command in flight.postponed:
            self.handle(command)
        self._follow(computed)
        self._measure_prompts(_since_ms(flight.launched_s), flight.prompt_tokens)


def _since_ms(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1e3


def policy_of(engine: EngineConfig, blocks: int) -> SetPolicy:
    """The batching policy before the io process sets one."""
    return SetPolicy(
        engine.token_budget, engine.max_running, engine.prefill_chunk, int(engine.decode_headroom * blocks)
    )


def _attention(model: LoadedModel, memory: KvMemory, engine: EngineConfig) -> PagedAttention:
    if model.kernels is None and (model.device.type == "cpu" or engine.kernels == "torch"):
        return TorchAttention(memory.pool, model.spec.windows)
    if model.kernels is None:
        return device_attention(memory.pool, Geometry.of(model.decoder))
    spec, kernels, layout = model.spec, model.kernels, model.layout
    share = engine.shared_prefix_attention and not all(spec.windows) and not kernels.chunk % layout.page_tokens
    shape = KvShape(layout.kv_heads, layout.head_dim, layout.page_tokens, memory.pool.dtype)
    costs = fitted_costs(kernels, shape) if share else SHIPPED
    group = spec.heads // spec.kv_heads
    return KernelAttention(memory.pool, kernels, spec.windows, share=share, group=group, costs=costs)
