"""Owns the request bodies of /api/v1/kv: which pages, for how long, within which bounds; and verdicts on blends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from controller.http_api.field_types import INT32_MAX, PromptInput, check_ids
from controller.kv_operations import HOLD_MOST_S, KEYS_MOST, VERIFY_BYTES, VERIFY_MOST_S, VERIFY_S

INT63_MAX = 2**63 - 1

Key = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Of a page: 64 hexadecimal digits.")]
WorkerName = Annotated[str, Field(max_length=256, description="Empty = all.")]
TierName = Annotated[str, Field(max_length=64, description="Empty = all.")]
Salt = Annotated[str | None, Field(min_length=1, max_length=1024, description="That the prompt is sent with.")]


def _one_prompt(value: object) -> PromptInput:
    if isinstance(value, str):
        return PromptInput((value,))
    return PromptInput((check_ids(value),))


OnePrompt = Annotated[
    PromptInput,
    PlainValidator(_one_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}, "minItems": 1},
            ]
        }
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KvExplainBody(_Strict):
    """POST /api/v1/kv/explain. A text is tokenized as a completion's prompt is; for a chat give its token ids."""

    prompt: OnePrompt
    cache_salt: Salt = None


class KvSelectionBody(_Strict):
    """Which pages, where; `keys` and `prompt` add up, without either all are meant."""

    worker: WorkerName = ""
    tier: TierName = ""
    keys: list[Key] = Field(default=[], max_length=KEYS_MOST)
    prompt: OnePrompt | None = None
    cache_salt: Salt = None


class KvPinBody(KvSelectionBody):
    """POST /api/v1/kv/pin."""

    hold_s: float = Field(ge=0, le=HOLD_MOST_S, description="0 = lets go.")


class KvFlushBody(KvSelectionBody):
    """POST /api/v1/kv/flush."""


class KvVerifyBody(KvSelectionBody):
    """POST /api/v1/kv/verify."""

    deadline_s: float = Field(VERIFY_S, gt=0, le=VERIFY_MOST_S, description="Then the answer says that it was cut.")
    max_bytes: int = Field(VERIFY_BYTES, ge=1, le=INT63_MAX, description="In each tier of each worker.")
    after: Key | None = Field(None, description="Only pages with higher keys: goes on where an answer was cut.")


class BlendFiguresBody(_Strict):
    """Of the next token, full prefill against blended; or what is allowed of them."""

    mean_kl_nats: float = Field(ge=0)
    max_kl_nats: float = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1)


class BlendVerdictBody(_Strict):
    """POST /api/v1/kv/blend/verdicts: what a check found."""

    trial: str = Field(max_length=128, description="Its `cache_salt`.")
    method: Literal["blend", "epic"]
    ratio: float = Field(ge=0, le=1)
    first_tokens: int = Field(ge=0, le=INT32_MAX)
    blended_prompts: int = Field(ge=1, le=INT32_MAX)
    figures: BlendFiguresBody
    allowed: BlendFiguresBody
    failures: list[Annotated[str, Field(max_length=200)]] = Field(max_length=8, description="Empty = passed.")
