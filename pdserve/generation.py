"""Owns what goes into a generation and what comes out, as frozen dataclasses. Protobuf stays inside the SDK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Fields left at None take the server's defaults (temperature 1, top_p 1, the rest of the context)."""

    max_tokens: int | None = None
    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int | None = None  # equal seeds draw equal tokens
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None  # alternatives per generated token; None = no log-probabilities
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A forced route, for operators. prefill_worker empty = undisaggregated on decode_worker."""

    prefill_worker: str
    decode_worker: str
    transport: str = ""


@dataclass(frozen=True, slots=True)
class KvBlend:
    """KV of the prompt's chunks is taken from where they stood before, and partly computed anew: approximate (docs/blend.md).

    Say where the chunks are: offsets [start, end) into the prompt's tokens, or what stands between them. Refused with InvalidRequest
    where the cluster does not allow it.
    """

    chunks: Sequence[tuple[int, int]] = ()  # in order, disjoint; not the last two tokens
    separator: str | Sequence[int] = ""
    method: Literal["blend", "epic"] = "blend"
    # blend: share of the chunks' tokens computed anew; None = 0.15; "auto" = by measured speeds of loading and computing
    ratio: float | Literal["auto"] | None = None
    first_tokens: int | None = None  # epic: tokens of each chunk computed anew; None = 32


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What few requests need."""

    request_id: str = ""  # empty = made by the client; [A-Za-z0-9._-]{1,128}
    model: str = ""  # empty = the only one served
    cache_salt: str = ""  # keeps the prefix cache of this caller apart
    priority: int = 0
    token_ids_only: bool = False  # no text
    route: Route | None = None
    kv_blend: KvBlend | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token drawn first, then the alternatives, most likely first. Natural logarithm, before temperature."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `text` may lag behind `token_ids` (an incomplete character, a possible stop string)."""

    choice: int
    index: int  # output index of the first token id here
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str  # the stop string or id that matched


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    blended_tokens: int = 0  # of chunks whose KV was blended


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: str


@dataclass(frozen=True, slots=True)
class Generation:
    """All choices of one request, ended."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text
