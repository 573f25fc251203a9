"""Owns the request bodies: which fields exist, their types and bounds. What they mean together is in `sampling`.

Fields that are not declared here are kept as `model_extra`; see `refused_fields` for what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from controller.http_api.blend_body import KvBlendBody
from controller.http_api.field_types import Content, LogitBias, Prompt, Stop, TokenIds

MAX_MESSAGES = 4096
MAX_STOP_IDS = 128
MAX_LOGPROBS = 20
MAX_N = 128
INT32 = 2**31
INT64 = 2**63

Name = Annotated[str, Field(max_length=512)]
StopId = Annotated[int, Field(ge=0, lt=INT32)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(_Open):
    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in every chunk.")


class SamplingBody(_Open):
    """Fields that both endpoints share."""

    model: Name | None = Field(None, description="One of /v1/models; absent = the only one.")
    n: int | None = Field(
        None, ge=1, le=MAX_N, description="Choices per prompt (default 1); bounded by the server too."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    temperature: float | None = Field(None, ge=0, le=100, description="Default 1; 0 = greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT32, description="0 or -1 = off.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: LogitBias = ()
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="Absent = a fresh one.")
    stop: Stop = ()
    stop_token_ids: list[StopId] | None = Field(None, max_length=MAX_STOP_IDS)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=INT32)
    priority: int | None = Field(None, ge=-INT32, lt=INT32, description="Lower is served earlier; default 0.")
    cache_salt: str | None = Field(None, min_length=1, max_length=1024, description="Shares KV only with equal salts.")
    kv_blend: KvBlendBody | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for completions, false for chats.")
    return_token_ids: bool | None = Field(None, description="Adds token_ids and prompt_token_ids, as vLLM does.")
    return_tokens_as_token_ids: bool | None = Field(None, description='Tokens of logprobs as "token_id:N".')


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=INT32, description="Default 16; 0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives per token.")
    echo: bool | None = Field(None, description="The prompt comes back in front of the completion.")


class ChatMessage(_Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.model_extra and (self.model_extra.get("tool_calls") or self.model_extra.get("function_call")):
            raise ValueError("tool calls are not supported yet; put the call and its result into plain messages")
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=INT32, description="Default: the rest of the context.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT32, description="The newer name; goes first.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives; needs logprobs.")
    add_generation_prompt: bool | None = Field(None, description="Default true.")


class TokenizeBody(_Open):
    """POST /tokenize: a prompt or a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for prompts, false for chats.")
    add_generation_prompt: bool | None = Field(None, description="Default true.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(_Open):
    """POST /detokenize."""

    model: Name | None = None
    tokens: TokenIds


class RolesBody(BaseModel):
    """POST /api/v1/workers/{id}/roles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: list[Literal["prefill", "decode"]] = Field(min_length=1, max_length=2)
