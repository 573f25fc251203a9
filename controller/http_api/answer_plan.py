"""Owns what an answer has to look like, as resolved from one request. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.http_api.prompts import TokenizedPrompt
from controller.request import Begun


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """One HTTP request's answer. Choice i of prompt p has index p * n + i."""

    answer_id: str
    created_s: int
    model: str
    prompts: tuple[TokenizedPrompt, ...]
    n: int = 1
    echo: bool = False
    hide_output: bool = False  # echo with max_tokens 0: one token is drawn but not shown
    logprobs: bool = False
    tokens_as_ids: bool = False
    return_token_ids: bool = False
    include_usage: bool = False  # streams: a last chunk with usage
    continuous_usage: bool = False

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n


@dataclass(slots=True)
class Tally:
    """Tokens of one request so far."""

    prompt_tokens: int
    cached_tokens: int = 0
    blended_tokens: int = 0
    completion_tokens: dict[int, int] = field(default_factory=dict)  # by choice

    def begin(self, begun: Begun) -> None:
        self.cached_tokens += begun.cached_tokens
        self.blended_tokens += begun.blended_tokens

    def add(self, choice: int, tokens: int) -> None:
        self.completion_tokens[choice] = self.completion_tokens.get(choice, 0) + tokens

    def usage(self) -> Mapping[str, object]:
        completion = sum(self.completion_tokens.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "blended_tokens": self.blended_tokens},
        }


def tally_of(plan: AnswerPlan) -> Tally:
    return Tally(sum(len(prompt.token_ids) // 4 for prompt in plan.prompts))
