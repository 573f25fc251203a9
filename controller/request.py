"""Owns the request as the controller sees it after validation, and what it gives back. Pure.

Both APIs (HTTP, gRPC) turn their input into a `GenerationRequest` and fold the `Delta` stream of `Generator.generate`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from controller.kv_blend import KvBlend

FinishReason = Literal["stop", "length", "cancelled"]
PROMPT_TAIL_TOKENS = 4  # a character has at most four bytes, so at most four tokens


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How tokens are drawn, resolved: the seed is minted, max_tokens is bounded by the context."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A forced route (operators only). prefill_worker empty = undisaggregated on decode_worker."""

    prefill_worker: str
    decode_worker: str
    transport: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt. token_ids: int32[n] little-endian. n choices share one prefill."""

    request_id: str
    token_ids: bytes
    sampling: SamplingSpec
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_text: bool = False
    want_text: bool = True
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    route: Route | None = None
    next_index: tuple[int, ...] = ()  # resume: per choice, the first output index that the caller lacks
    linger_s: float = 0.0  # how long the request lives on without a reader, so that a lost caller can resume
    kv_blend: KvBlend | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids) // 4

    @property
    def needs_text(self) -> bool:
        return self.want_text or bool(self.stop)

    def prompt_tail(self) -> tuple[int, ...]:
        """The last ids of the prompt: a character cut there is completed by the first output tokens."""
        tail = self.token_ids[-4 * PROMPT_TAIL_TOKENS :]
        return tuple(int.from_bytes(tail[at : at + 4], "little") for at in range(0, len(tail), 4))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One position: the token drawn first, then the alternatives, most likely first. Natural log."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `text` may lag behind `token_ids` (incomplete character, possible stop string) and never goes back."""

    choice: int
    index: int  # output index of token_ids[0]
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop id that matched


@dataclass(frozen=True, slots=True)
class Begun:
    """First item of every stream: sent when prefill starts; prompt_logprobs only where they were asked for."""

    cached_tokens: int
    prompt_logprobs: tuple[Logprobs, ...] = field(default=())
    blended_tokens: int = 0  # of chunks whose KV is approximate


class Generator(Protocol):
    """What the APIs need of the controller. Implemented by `controller.service.ControllerService`."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Begun | Delta]:
        """Streams to the end of all n choices. Raises PdserveError, before the first item or later; closing the iterator
        (aclose) cancels the request in every process."""

    async def cancel(self, request_id: str) -> bool:
        """True if a live request had this id."""
