"""Owns how a request asks that KV of its chunks be blended: the recipe, which tokens are chunks, and what is refused. Pure.

Blended KV is approximate. A request opts in; whether it may is in `blend_gate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from kv_transfer.keys import TOKEN_BYTES, chunk_hashes, namespace_root
from pdserve.errors import InvalidRequest
from pdserve.v1 import worker_pb2

Method = Literal["blend", "epic"]
Ratio: TypeAlias = float | Literal["auto"]
DEFAULT_RATIO = 0.15
DEFAULT_FIRST_TOKENS = 32
MAX_FIRST_TOKENS = 2**31 - 1
LEAST_CHUNK_TOKENS = 16  # shorter ones cost more to look up than to compute
MAX_CHUNKS = 1024
# The last token is what the first output token is drawn from. The one before it is always computed by an engine that blends; if a
# chunk could hold it, a request that is taken up again, with output behind its prompt, would choose other tokens.
FRESH_TAIL_TOKENS = 2

_METHODS: dict[Method, worker_pb2.Blend.Method.ValueType] = {
    "blend": worker_pb2.Blend.METHOD_BLEND,
    "epic": worker_pb2.Blend.METHOD_EPIC,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """ratio: of the chunks' tokens that are computed anew (CacheBlend); "auto": chosen by measured speeds (`controller.blend_ratio`),
    once for all attempts. first_tokens: of each chunk, computed anew (EPIC)."""

    method: Method = "blend"
    ratio: Ratio = DEFAULT_RATIO
    first_tokens: int = DEFAULT_FIRST_TOKENS

    def __post_init__(self) -> None:
        if self.ratio != "auto" and not 0 <= self.ratio <= 1:
            raise InvalidRequest("kv_blend.ratio: must lie between 0 and 1.", param="kv_blend.ratio")
        if not 0 <= self.first_tokens <= MAX_FIRST_TOKENS:
            raise InvalidRequest("kv_blend.first_tokens: must not be negative.", param="kv_blend.first_tokens")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of the prompt."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class KvBlend:
    """chunks: in order, disjoint, worth it; at least one."""

    recipe: Recipe
    chunks: tuple[Chunk, ...]

    @property
    def undecided(self) -> bool:
        """Whether its ratio is still to be chosen."""
        return self.recipe.method == "blend" and self.recipe.ratio == "auto"

    def with_ratio(self, ratio: float) -> KvBlend:
        return replace(self, recipe=replace(self.recipe, ratio=ratio))


def check_prompt_logprobs(prompt_logprobs: int | None) -> None:
    if prompt_logprobs is not None:
        raise InvalidRequest(
            "kv_blend: cannot be combined with log-probabilities of the prompt, which are computed exactly. Leave out one of them.",
            param="kv_blend",
        )


def blend(recipe: Recipe, chunks: Sequence[Chunk], prompt_tokens: int) -> KvBlend | None:
    """The chunks that are worth it; None where none is: the request is then computed exactly. Raises InvalidRequest for too many."""
    room = prompt_tokens - FRESH_TAIL_TOKENS
    kept = tuple(chunk for chunk in _cut(chunks, room) if chunk.end - chunk.start >= LEAST_CHUNK_TOKENS)
    if len(kept) > MAX_CHUNKS:
        raise InvalidRequest(
            f"kv_blend: the prompt has {len(kept)} chunks, at most {MAX_CHUNKS} are allowed. Join neighbours.",
            param="kv_blend",
        )
    return KvBlend(recipe, kept) if kept else None


def _cut(chunks: Sequence[Chunk], room: int) -> Iterable[Chunk]:
    return (Chunk(chunk.start, min(chunk.end, room)) for chunk in chunks if chunk.start < room)


def marked(pairs: Sequence[tuple[int, int]], prompt_tokens: int) -> tuple[Chunk, ...]:
    """Chunks that the client gave as offsets. Raises InvalidRequest with the first wrong one."""
    end = 0
    for place, (start, stop) in enumerate(pairs):
        param = f"kv_blend.chunks[{place}]"
        if not 0 <= start < stop:
            raise _refused(param, f"[{start}, {stop}] is empty: give [start, end], with end behind start")
        if start < end:
            raise _refused(
                param, f"[{start}, {stop}] begins before the end of the one before it, {end}: give them in order"
            )
        if stop > prompt_tokens - FRESH_TAIL_TOKENS:
            raise _refused(
                param,
                f"[{start}, {stop}] reaches the last {FRESH_TAIL_TOKENS} of the prompt's {prompt_tokens} tokens, which are always "
                f"computed: let it end at {max(prompt_tokens - FRESH_TAIL_TOKENS, 0)} or before",
            )
        end = stop
    return tuple(Chunk(*pair) for pair in pairs)


def separated(token_ids: bytes, separator: bytes) -> tuple[Chunk, ...]:
    """What lies before each occurrence of `separator` in the prompt (both int32, little-endian). What follows the last one, the
    question, is no chunk. Raises InvalidRequest where it does not occur."""
    if not separator:
        raise _refused("kv_blend.separator", "has no token: give text or token ids that stand between your chunks")
    chunks: list[Chunk] = []
    start, width = 0, len(separator) // TOKEN_BYTES
    while (found := _find(token_ids, separator, start)) >= 0:
        chunks.append(Chunk(start, found))
        start = found + width
    if not chunks:
        raise _refused(
            "kv_blend.separator",
            f"its {width} tokens do not occur in the prompt. Text may join with what stands beside it when it is tokenised: use a "
            "special token, or give the separator as token ids (see /tokenize)",
        )
    return tuple(chunks)


def _find(token_ids: bytes, wanted: bytes, start: int) -> int:
    """Index of the token where `wanted` begins, from token `start` on; -1 where it does not."""
    at = token_ids.find(wanted, start * TOKEN_BYTES)
    while at >= 0 and at % TOKEN_BYTES:
        at = token_ids.find(wanted, at + 1)
    return at // TOKEN_BYTES if at >= 0 else -1


def put_blend(work: worker_pb2.Work, asked: KvBlend, keys: Sequence[bytes]) -> None:
    """keys: of each chunk. The work must carry no block hashes: approximate KV enters no exact index."""
    assert not work.block_hashes
    assert not asked.undecided
    recipe = asked.recipe
    for chunk, packed in zip(asked.chunks, keys, strict=True):
        work.chunks.append(worker_pb2.Chunk(start=chunk.start, count=chunk.end - chunk.start, keys=packed))
    work.blend.method, work.blend.first_tokens = _METHODS[recipe.method], recipe.first_tokens
    work.blend.ratio = DEFAULT_RATIO if recipe.ratio == "auto" else recipe.ratio  # EPIC does not look at it


def keys_of(chunks: Iterable[Chunk], token_ids: bytes, identity: bytes, cache_salt: str) -> list[bytes]:
    """Keys of the hash units of each chunk, by its content."""
    root, content = namespace_root(identity, cache_salt), memoryview(token_ids)
    spans = (slice(chunk.start * TOKEN_BYTES, chunk.end * TOKEN_BYTES) for chunk in chunks)
    return [chunk_hashes(root, bytes(content[span])) for span in spans]


def _refused(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {what}.", param=param)
