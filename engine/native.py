"""Owns the native engine: the decoder over a paged KV pool, stepped by the schedule, behind the Engine protocol."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import torch

from engine.blend_chunks import BlendChunks
from engine.blend_jobs import BlendJobs
from engine.block_tables import BlockTables
from engine.cuda_graphs import cuda_graphs
from engine.cuda_varlen import Geometry, device_attention
from engine.dispatch_desk import DispatchDesk
from engine.forward import ForwardPass
from engine.kernel_attention import KernelAttention
from engine.kv_exchange import KvExchange
from engine.kv_memory import KvMemory, copy_blocks
from engine.loaded_model import LoadedModel, load_model
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
    KvReady,
    Load,
    PromptLogprobs,
    ReleaseSource,
    ReserveBlocks,
    SetPolicy,
    Started,
    Stop,
    Submit,
    WriterDone,
)
from engine.refusals import Doorkeeper
from engine.sampler import BadLogits, Draw, Drawn, Sampler, logprob_rows
from engine.schedule import Part, Schedule, StepPlan
from engine.sequences import Sequence
from engine.step_batch import StepBatch, build
from engine.step_tokens import StepColumns
from engine.torch_attention import TorchAttention
from kv_transfer.keys import fingerprint_seed
from pdserve.errors import NoCapacity, PdserveError
from service_kit.config import EngineConfig, ModelConfig

_AVERAGE_WEIGHT = 0.1  # of a step in the running average of step times
_LEAST_PROMPT_TOKENS = 64  # in a step whose time tells how fast prompts are computed
_AUDIT_INTERVAL_S = 0.25
_LOGPROB_ROWS = 256  # prompt rows whose logits are held at once


@dataclass(frozen=True, slots=True)
class _Announcement:
    """Blocks of a prefill that become final in this step: ordinals [first, first + count) of its table."""

    sequence: Sequence
    first: int
    blocks: tuple[int, ...]


class NativeEngine:
    """Implements engine.protocol.Engine. One thread calls it; `handle` and `step` never wait for anybody."""

    def __init__(self, model: LoadedModel, memory: KvMemory, engine: EngineConfig, sink: EventSink) -> None:
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
        graphs = cuda_graphs(model.decoder) if engine.cuda_graphs else None
        self._forward = ForwardPass(model.decoder, _attention(model, memory, engine), graphs)
        self._sampler = Sampler(model.spec.vocab, model.spec.eos_token_ids, model.device)
        self._steps = 0
        self._step_ms = 0.0
        self._prefill_token_us = 0.0
        self._leaked = 0
        self._audit_due_s = 0.0

    @classmethod
    def open(cls, model: ModelConfig, engine: EngineConfig, sink: EventSink) -> NativeEngine:
        """Loads the checkpoint and allocates the pool. Raises ConfigInvalid or ModelUnsupported."""
        loaded, memory = load_model(model, engine)
        return cls(loaded, memory, engine, sink)

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
        )

    def close(self) -> None:
        self._memory.close()

    # ---- Engine

    def handle(self, command: Command) -> None:
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
        plan = self._schedule.plan()
        for sequence in plan.failed:
            self._desk.fail(sequence, NoCapacity("The request alone needs more KV blocks than the pool has."))
        for sequence in plan.admitted:
            self._start(sequence)
        blending = self._blend()
        if plan.parts:
            self._compute(plan)
        else:
            self._memory.settle()  # nothing is left to copy beside
        self._exchange.tell()
        self._sink.flush()
        return not plan.empty or bool(plan.admitted) or blending

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
        if state.mode == "prefill" and table.stored:
            cached = _Announcement(sequence, 0, tuple(table.blocks[: table.stored]))
            sequence.announced = table.stored
            for layer in range(self._model.spec.layers):
                self._announce(layer, [cached])

    def _blend(self) -> bool:
        """One piece of a blend in progress, if one has anything to do; a sequence whose blend is done is in the next plan."""
        waiting = self._blends.busy
        blending = self._blends.advance(self._announce_blended)
        self._steps += waiting  # neither a blend nor its wait for pages is a hang
        return blending

    def _announce_blended(self, sequence: Sequence, layer: int) -> None:
        """All full pages before the last token are final in this layer."""
        if sequence.state.mode != "prefill":
            return
        assert sequence.table is not None
        sequence.announced = (len(sequence.tokens) - 1) // self._tables.page_tokens
        if sequence.announced:
            blocks = tuple(sequence.table.blocks[: sequence.announced])
            self._announce(layer, [_Announcement(sequence, 0, blocks)])

    def _compute(self, plan: StepPlan) -> None:
        start_s = time.perf_counter()
        copy_blocks(self._memory.pool, plan.copies)
        batch = build(plan.parts, self._tables.page_tokens, self._model.device)
        announcements = [item for part in plan.parts if (item := self._announcement(part)) is not None]
        hidden = self._forward.run(batch, lambda layer: self._announce(layer, announcements))
        self._score_prompts(batch, hidden)
        self._memory.settle()  # before anything that frees blocks, and before PrefillDone
        drawing = self._advance(batch)
        self._draw(batch, drawing, hidden)
        self._steps += 1
        step_ms = (time.perf_counter() - start_s) * 1e3
        self._step_ms += (step_ms - self._step_ms) * (_AVERAGE_WEIGHT if self._steps > 1 else 1.0)
        prompt_tokens = sum(part.count for part in plan.parts if part.count > 1)
        if prompt_tokens >= _LEAST_PROMPT_TOKENS:
            token_us, known_us = step_ms * 1e3 / prompt_tokens, self._prefill_token_us
            self._prefill_token_us += (token_us - known_us) * (_AVERAGE_WEIGHT if known_us else 1.0)

    def _announcement(self, part: Part) -> _Announcement | None:
        """Full blocks as they come, the tail with the last chunk."""
        sequence = part.sequence
        if sequence.state.mode != "prefill":
            return None
        assert sequence.table is not None
        end = sequence.computed + part.count
        pages = self._tables.pages_for(end) if part.count == sequence.missing else end // self._tables.page_tokens
        first, sequence.announced = sequence.announced, max(pages, sequence.announced)
        blocks = tuple(sequence.table.blocks[first:pages])
        return _Announcement(sequence, first, blocks) if blocks else None

    def _announce(self, layer: int, announcements: list[_Announcement]) -> None:
        for item in announcements:
            ready = KvReady(item.sequence.state.dispatch, layer, item.first, len(item.blocks))
            self._memory.publish(layer, item.blocks, partial(self._sink.emit, ready))
        if announcements:
            self._sink.flush()  # a layer's KV leaves while the next one is computed

    def _score_prompts(self, batch: StepBatch, hidden: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the computed ones, where they were asked for."""
        for part, start in zip(batch.parts, batch.starts, strict=True):
            sequence, work = part.sequence, part.sequence.state.work
            top = work.sampling.prompt_logprobs
            if top is None:
                continue
            end = min(sequence.computed + part.count, work.prompt_tokens - 1)
            for first in range(sequence.computed, end, _LOGPROB_ROWS):
                count = min(_LOGPROB_ROWS, end - first)
                row = start + first - sequence.computed
                following = torch.tensor(sequence.tokens[first + 1 : first + 1 + count], device=hidden.device)
                logits = self._forward.logits(hidden[row : row + count])
                sequence.prompt_rows += logprob_rows(logits, following.long(), top)

    def _advance(self, batch: StepBatch) -> list[int]:
        """Counts the computed tokens. Returns the ordinals of the parts whose sequences draw now."""
        drawing: list[int] = []
        for ordinal, part in enumerate(batch.parts):
            sequence = part.sequence
            assert sequence.table is not None
            sequence.computed += part.count
            self._tables.store(sequence.table, sequence.tokens, sequence.computed)
            if not sequence.missing:
                drawing.append(ordinal)
        return drawing

    # ---- tokens

    def _draw(self, batch: StepBatch, drawing: list[int], hidden: torch.Tensor) -> None:
        """Draws for every choice of the sequences `drawing`, tells the tokens, then lets them go on, fork or end."""
        if not drawing:
            return
        rows = torch.tensor([batch.last_row(ordinal) for ordinal in drawing], device=hidden.device)
        logits = self._forward.logits(hidden.index_select(0, rows))
        sequences = [batch.parts[ordinal].sequence for ordinal in drawing]
        drawn, bad = self._drawn(logits, sequences)
        columns = StepColumns(self._steps + 1, self._model.spec.eos_token_ids, self._model.max_context_tokens)
        going_on: list[dict[int, int]] = []
        for sequence, tokens in zip(sequences, drawn, strict=True):
            work, index = sequence.state.work, sequence.output_index
            going_on.append(
                {
                    choice: draw.token_id
                    for choice, draw in tokens.items()
                    if columns.add(work, choice, index, draw.token_id, draw.logprobs)
                }
            )
            if work.sampling.prompt_logprobs is not None and not sequence.forked:
                self._sink.emit(PromptLogprobs(work.dispatch, tuple(sequence.prompt_rows)))
        message = columns.message()
        if message is not None:
            self._sink.emit(message)
        for sequence, tokens_on in zip(sequences, going_on, strict=True):
            if sequence in bad:
                self._desk.fail(sequence, bad[sequence])
            else:
                self._go_on(sequence, tokens_on)

    def _drawn(
        self, logits: torch.Tensor, sequences: list[Sequence]
    ) -> tuple[list[dict[int, Drawn]], dict[Sequence, PdserveError]]:
        """Tokens by choice for each sequence, and the sequences whose logits cannot be drawn from."""
        owners = [(row, choice) for row, sequence in enumerate(sequences) for choice in sequence.choices]
        bad: dict[Sequence, PdserveError] = {}
        while True:
            owners = [(row, choice) for row, choice in owners if sequences[row] not in bad]
            draws = [_draw_of(sequences[row], choice) for row, choice in owners]
            try:
                drawn = self._sampler.draw(_rows_of(logits, owners), draws) if draws else []
                break
            except BadLogits as error:
                bad[sequences[owners[error.row][0]]] = error
        tokens: list[dict[int, Drawn]] = [{} for _ in sequences]
        for (row, choice), draw in zip(owners, drawn, strict=True):
            tokens[row][choice] = draw
        return tokens, bad

    def _go_on(self, sequence: Sequence, going_on: dict[int, int]) -> None:
        if not sequence.forked:
            self._desk.prompt_done(sequence, going_on)
        elif going_on:
            sequence.tokens.append(going_on[sequence.choices[0]])
        else:
            self._desk.end_choices(sequence.state, sequence.choices)


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
    return KernelAttention(memory.pool, model.kernels, model.spec.windows, share=engine.shared_prefix_attention)


def _draw_of(sequence: Sequence, choice: int) -> Draw:
    work = sequence.state.work
    return Draw(work.sampling, choice, sequence.tokens, work.prompt_tokens)


def _rows_of(logits: torch.Tensor, owners: list[tuple[int, int]]) -> torch.Tensor:
    """One row of logits per choice; the choices of one sequence share a row."""
    rows = [row for row, _ in owners]
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
