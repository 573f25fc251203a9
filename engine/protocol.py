"""Owns the Engine protocol: the commands an engine takes, the events it gives. Torch-free.

The io process and the simulator know engines only through this file and its part for pages (`engine.page_protocol`). Three
engines fit it: the native one (`engine.native`), the modelled one (`simulator.modelled_engine`) and, later, foreign ones such
as vLLM behind its KV connector.

Commands and events are msgspec structs, encoded as MessagePack arrays (see `COMMANDS` and `EVENTS` at the end). Token ids
and block hashes travel as raw bytes: little-endian int32, and 32 bytes per hash unit of 16 tokens.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from engine.page_protocol import KvOffered, LoadPages, OfferPages, PagesLate, PagesLoaded, PagesOpened, PagesSaved


class Dispatch(msgspec.Struct, frozen=True, array_like=True):
    """Names one dispatch of a request. Issued by the controller."""

    request_key: int
    attempt: int


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are drawn; every field resolved by the controller. `temperature` 0 = greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class ChunkSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + count) of the prompt are a chunk whose KV may come from elsewhere. keys: by content, of its hash units
    (`kv_transfer.keys.chunk_hashes`)."""

    start: int
    count: int
    keys: bytes


class BlendSpec(msgspec.Struct, frozen=True, array_like=True):
    """How chunks are blended, see `engine.blend_selection`. "blend": `ratio` of their tokens are computed anew, those whose KV
    deviates most; "epic": the first `first_tokens` of each chunk."""

    method: Literal["blend", "epic"]
    ratio: float
    first_tokens: int


class KvSource(msgspec.Struct, frozen=True, array_like=True):
    """A worker that holds the KV of the first `tokens` tokens of a prompt, as far as the controller knows. address: gRPC."""

    worker_id: str
    address: str
    tokens: int


class Work(msgspec.Struct, frozen=True, array_like=True):
    """One dispatch: all its choices share `token_ids`.

    token_ids: int32[n] little-endian; the first `prompt_tokens` are the prompt, the others output accepted in earlier attempts.
    block_hashes: chained keys of the full 16-token units of `token_ids`, 32 bytes each.
    blend: its KV is approximate, made of `chunks` where that saves time. Such work carries no block_hashes: nothing of it enters the
    prefix index, here or at the decode worker.
    source: where more of its KV lies than here; for the io process, engines do not look at it.
    """

    dispatch: Dispatch
    request_id: str
    choices: tuple[int, ...]
    token_ids: bytes
    prompt_tokens: int
    sampling: Sampling
    block_hashes: bytes
    priority: int = 0
    chunks: tuple[ChunkSpan, ...] = ()  # in order, disjoint, inside the prompt
    blend: BlendSpec | None = None
    tenant: bytes = b""  # digest that quotas of the tiers are counted by
    source: KvSource | None = None


# ---- commands, io -> engine


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """Compute `work`. "prefill": up to the first token, KV offered through KvReady and kept until ReleaseSource.
    "generate": to the end on this worker. loads: where the work is blended, for each of its chunks the load that is bringing its
    pages, or 0; each of them is answered by PagesLoaded or PagesLate in bounded time. Empty: none is."""

    work: Work
    mode: Literal["prefill", "generate"]
    loads: tuple[int, ...] = ()


class ReserveBlocks(msgspec.Struct, frozen=True, tag="reserve", array_like=True):
    """Destination side of a hand-off: all blocks for the KV of work.token_ids, all or nothing. Answered at once by
    Reserved or ReserveRefused."""

    work: Work
    lease_ms: int


class Activate(msgspec.Struct, frozen=True, tag="activate", array_like=True):
    """The KV of work.token_ids lies verified in the reserved blocks: go on from the first tokens, (choice, token id) pairs.
    Choices of the work that are not listed ended with their first token. Implies WriterDone."""

    dispatch: Dispatch
    first_tokens: tuple[tuple[int, int], ...]


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Stop; unknown dispatches leave a tombstone for twice the lease. Reserved blocks stay until WriterDone too."""

    dispatch: Dispatch
    choices: tuple[int, ...] = ()  # empty = all


class WriterDone(msgspec.Struct, frozen=True, tag="writer_done", array_like=True):
    """No writer can touch the reserved blocks of this dispatch any more (FIN, fence, or death of the endpoint)."""

    dispatch: Dispatch


class ReleaseSource(msgspec.Struct, frozen=True, tag="release_source", array_like=True):
    """The source lease of a prefill has ended: its blocks may be reused (they stay in the prefix index)."""

    dispatch: Dispatch


class SetPolicy(msgspec.Struct, frozen=True, tag="set_policy", array_like=True):
    """Batching policy of the role(s) the worker now holds, see `engine.schedule`. Takes effect at the next step."""

    token_budget: int  # tokens per step, decodes included
    max_running: int  # sequences decoding at once
    prefill_chunk: int  # largest chunk of one prompt per step; 0 = whole prompts, unchunked
    decode_headroom_blocks: int  # free blocks kept back from Reserve for the growth of running sequences


class ClearPrefixCache(msgspec.Struct, frozen=True, tag="clear_prefix_cache", array_like=True):
    """Forget every block that no sequence holds."""


class Stop(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    """Leave the loop. Running work is dropped; draining is the io process's business."""


Command = (
    Submit
    | ReserveBlocks
    | Activate
    | Cancel
    | WriterDone
    | ReleaseSource
    | SetPolicy
    | ClearPrefixCache
    | OfferPages
    | PagesSaved
    | LoadPages
    | PagesLoaded
    | PagesLate
    | Stop
)

# ---- events, engine -> io


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """The arena: [layer][block][k, v][page token][head][dim], so that adjacent blocks of a layer are one range of bytes."""

    layers: int
    blocks: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str  # "float32", "bfloat16", or "float8_e4m3": torch's float8_e4m3fn without a scale
    block_bytes: int  # of one block of one layer, K and V together


class EngineReady(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """First event. The arena's file descriptor travels beside it (SCM_RIGHTS); size = layers * blocks * block_bytes.
    token_growth: what each token before a token adds to its compute, as a share of the first one's; 0 = nothing."""

    model: str
    identity: (
        bytes  # SHA-256 over model, weights digest, logical KV dtype, heads, RoPE: kv_transfer.keys.identity_digest
    )
    layout: Layout
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    pid: int
    load_seconds: float
    token_growth: float = 0.0


class Started(msgspec.Struct, frozen=True, tag="started", array_like=True):
    """`dispatch` was admitted to a batch. blocks: ids of its block table so far (prompt blocks); cached_tokens came from the index;
    blended_tokens: of chunks whose KV is blended."""

    dispatch: Dispatch
    blocks: tuple[int, ...]
    cached_tokens: int
    queue_us: int
    blended_tokens: int = 0


class KvReady(msgspec.Struct, frozen=True, tag="kv_ready", array_like=True):
    """Layer `layer` of blocks [first_block, first_block + block_count) (ordinals in the block table) is final in the arena.
    The tail block, partly filled, is announced once, with the last chunk."""

    dispatch: Dispatch
    layer: int
    first_block: int
    block_count: int


class PrefillDone(msgspec.Struct, frozen=True, tag="prefill_done", array_like=True):
    """All KV of the work was announced; the first tokens are in the StepTokens before this one. `going_on`: (choice, first
    token id) of the choices that did not end with it; empty = nothing to hand off."""

    dispatch: Dispatch
    going_on: tuple[tuple[int, int], ...]
    compute_us: int


class LogprobRow(msgspec.Struct, frozen=True, array_like=True):
    """Token drawn first, then the most likely ones. Natural log of the model's raw distribution: log-softmax of the logits before
    temperature, penalties, bias and truncation (vLLM's default)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class StepTokens(msgspec.Struct, frozen=True, tag="tokens", array_like=True):
    """All tokens of one step, in columns. finish: 0 none, 1 stop, 2 length, 3 cancelled (protobuf FinishReason)."""

    step: int
    request_keys: tuple[int, ...]
    attempts: tuple[int, ...]
    choices: tuple[int, ...]
    indices: tuple[int, ...]  # output index: 0 is the first token after the prompt
    token_ids: tuple[int, ...]
    finish: tuple[int, ...]
    logprobs: tuple[LogprobRow | None, ...] = ()  # empty, or one per column


class PromptLogprobs(msgspec.Struct, frozen=True, tag="prompt_logprobs", array_like=True):
    """Rows for prompt tokens 1 .. n-1 of the work, before its first token."""

    dispatch: Dispatch
    rows: tuple[LogprobRow, ...]


class Reserved(msgspec.Struct, frozen=True, tag="reserved", array_like=True):
    """Block table (ids) for work.token_ids. The first cached_tokens // page_tokens blocks are shared from the prefix index and
    must not be written. generations: owner number of each block, raised at each reuse."""

    dispatch: Dispatch
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    cached_tokens: int


class ReserveRefused(msgspec.Struct, frozen=True, tag="reserve_refused", array_like=True):
    dispatch: Dispatch
    reason: str  # of pdserve.errors: no_capacity, context_length_exceeded, cancelled
    message: str


class WorkFailed(msgspec.Struct, frozen=True, tag="work_failed", array_like=True):
    """Typed failure of one dispatch; the engine lives on."""

    dispatch: Dispatch
    choices: tuple[int, ...]  # empty = all
    reason: str
    message: str


class Freed(msgspec.Struct, frozen=True, tag="freed", array_like=True):
    """The dispatch holds no block here any more (after Cancel, ReleaseSource, WriterDone or its end)."""

    dispatch: Dispatch


class KvStored(msgspec.Struct, frozen=True, tag="kv_stored", array_like=True):
    """Blocks entered the prefix index of the device pool; 32-byte keys of hash units."""

    block_hashes: bytes


class KvEvicted(msgspec.Struct, frozen=True, tag="kv_evicted", array_like=True):
    block_hashes: bytes


class Load(msgspec.Struct, frozen=True, tag="load", array_like=True):
    """Sent at least every 0.25 s, also when idle, and after every Reserved or ReserveRefused."""

    step: int
    blocks_total: int
    blocks_free: int  # free or evictable
    blocks_leaked: int  # checked invariant: neither free, cached, nor owned by a live dispatch
    reserved_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    step_ms: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    resident_bytes: int
    prefill_token_us: float = 0.0  # of the last steps that computed prompts; 0 = there was none yet
    key_collisions: int = 0  # lookups in the prefix index that met another page under the key
    pinned_bytes: int = 0  # of the arena, registered with the CUDA driver


Event = (
    EngineReady
    | Started
    | KvReady
    | PrefillDone
    | StepTokens
    | PromptLogprobs
    | Reserved
    | ReserveRefused
    | WorkFailed
    | Freed
    | KvStored
    | KvEvicted
    | KvOffered
    | PagesOpened
    | Load
)

COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
ENCODER = msgspec.msgpack.Encoder()


class DispatchFault(Exception):
    """An error of `Engine.step` that one dispatch caused and that leaves the engine sound: the loop answers WorkFailed with
    `reason` (of pdserve.errors), cancels the dispatch and goes on. Every other exception of `step` ends the engine process."""

    def __init__(self, dispatch: Dispatch, reason: str, message: str) -> None:
        super().__init__(message)
        self.dispatch = dispatch
        self.reason = reason


class EventSink(Protocol):
    """Where an engine puts its events. `emit` never blocks for long; `flush` pushes what was buffered."""

    def emit(self, event: Event) -> None: ...

    def flush(self) -> None: ...


class Engine(Protocol):
    """An engine owns its loop. Contract suite: tests/contracts/test_engine_contract.py."""

    def handle(self, command: Command) -> None:
        """Takes one command. Never raises for bad work: answers WorkFailed or ReserveRefused."""

    def step(self) -> bool:
        """One batch step, events through the sink. False: nothing to do until the next command."""

    def load(self) -> Load: ...
