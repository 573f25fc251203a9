"""Owns the answer that is not streamed: deltas folded into one JSON object. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from controller.http_api.answer_plan import AnswerPlan, tally_of
from controller.http_api.logprob_formats import LogprobFormat, prompt_positions
from controller.request import Begun, Delta, Logprobs

Record = dict[str, object]


@dataclass(slots=True)
class ChoiceFold:
    """One choice so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[Logprobs] = field(default_factory=list)
    finish: Delta | None = None


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """In what completions and chats differ."""

    object_name: str
    text: Callable[[str], Record]
    prompt_ids_on_top: bool


COMPLETION_ANSWER = AnswerShape("text_completion", lambda text: {"text": text}, prompt_ids_on_top=False)
CHAT_ANSWER = AnswerShape(
    "chat.completion",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    prompt_ids_on_top=True,
)


class WholeAnswer:
    def __init__(self, plan: AnswerPlan, shape: AnswerShape, logprobs: LogprobFormat | None) -> None:
        self._plan = plan
        self._shape = shape
        self._logprobs = logprobs
        self._tally = tally_of(plan)
        self._choices = [ChoiceFold() for _ in range(plan.choices)]
        self._prompt_logprobs: dict[int, tuple[Logprobs, ...]] = {}

    def feed(self, prompt: int, news: Begun | Delta) -> None:
        if isinstance(news, Begun):
            self._tally.begin(news)
            self._prompt_logprobs[prompt] = news.prompt_logprobs
            return
        index = prompt * self._plan.n + news.choice
        choice = self._choices[index]
        choice.finish = news if news.finish_reason is not None else choice.finish
        if self._plan.hide_output:
            return
        choice.text.append(news.text)
        choice.token_ids.extend(news.token_ids)
        choice.positions.extend(news.logprobs)
        self._tally.add(index, len(news.token_ids))

    def result(self) -> bytes:
        """The body, once every generator has ended."""
        answer: Record = {
            "id": self._plan.answer_id,
            "object": self._shape.object_name,
            "created": self._plan.created_s,
            "model": self._plan.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": self._tally.usage(),
        }
        if self._plan.return_token_ids and self._shape.prompt_ids_on_top:
            answer["prompt_token_ids"] = self._plan.prompts[0].ids
        return orjson.dumps(answer)

    def _choice(self, index: int, choice: ChoiceFold) -> Record:
        finish = choice.finish
        assert finish is not None, "a generator ends only when each of its choices has finished"
        prompt = self._plan.prompts[index // self._plan.n]
        echoed = (prompt.text or "") if self._plan.echo else ""
        record: Record = {
            "index": index,
            **self._shape.text(echoed + "".join(choice.text)),
            "logprobs": self._logprobs_of(index, choice),
            "finish_reason": finish.finish_reason,
            "stop_reason": finish.stop_reason,
        }
        if self._plan.return_token_ids:
            record["token_ids"] = choice.token_ids
            if not self._shape.prompt_ids_on_top:
                record["prompt_token_ids"] = prompt.ids
        return record

    def _logprobs_of(self, index: int, choice: ChoiceFold) -> object:
        if self._logprobs is None:
            return None
        ids: list[int] = []
        positions: list[Logprobs | None] = []
        if self._plan.echo:
            ids = self._plan.prompts[index // self._plan.n].ids
            positions = prompt_positions(len(ids), self._prompt_logprobs.get(index // self._plan.n, ()))
        return self._logprobs.render(index, [*ids, *choice.token_ids], [*positions, *choice.positions])
