"""Owns the chunks of a stream: deltas folded into SSE bytes. Pure.

What does not change is rendered once per request; per event only the text goes through orjson (costs: docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from controller.http_api.answer_plan import AnswerPlan, tally_of
from controller.http_api.logprob_formats import LogprobFormat, prompt_positions
from controller.request import Begun, Delta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """In what completions and chats differ."""

    object_name: str
    text_open: bytes
    text_close: bytes
    empty: bytes  # of a finish chunk
    role: bytes  # of the first chunk of a choice; empty where there is none
    prompt_ids_on_top: bool


COMPLETION_SHAPE = ChunkShape("text_completion", b'"text":', b"", b'"text":""', b"", prompt_ids_on_top=False)
CHAT_SHAPE = ChunkShape(
    "chat.completion.chunk",
    b'"delta":{"content":',
    b"}",
    b'"delta":{}',
    b'"delta":{"role":"assistant","content":""}',
    prompt_ids_on_top=True,
)


@dataclass(frozen=True, slots=True)
class _Extras:
    """Fields that most chunks lack."""

    logprobs: object = None
    finish: Delta | None = None
    token_ids: Sequence[int] | None = None
    prompt_ids: Sequence[int] | None = None


_NO_EXTRAS = _Extras()


class ChunkStream:
    """State of one stream: which choices have begun, and the tokens so far."""

    def __init__(self, plan: AnswerPlan, shape: ChunkShape, logprobs: LogprobFormat | None) -> None:
        self._plan = plan
        self._shape = shape
        self._logprobs = logprobs
        self._tally = tally_of(plan)
        self._begun: set[int] = set()
        self._head = b"data: " + orjson.dumps(
            {"id": plan.answer_id, "object": shape.object_name, "created": plan.created_s, "model": plan.model}
        )[:-1]  # fmt: skip
        self._text_heads = [
            self._head + b',"choices":[{"index":%d,' % choice + shape.text_open for choice in range(plan.choices)
        ]
        self._plain_tail = shape.text_close + b',"logprobs":null,"finish_reason":null}]'

    def feed(self, prompt: int, news: Begun | Delta) -> bytes:
        """Zero or more whole events."""
        if isinstance(news, Begun):
            self._tally.begin(news)
            return self._echo(prompt, news) if self._plan.echo else b""
        choice = prompt * self._plan.n + news.choice
        if self._plan.hide_output:
            return self._finish(choice, news) if news.finish_reason is not None else b""
        self._tally.add(choice, len(news.token_ids))
        begin = b"" if choice in self._begun else self._begin(choice, prompt)
        if self._logprobs is None and not self._plan.return_token_ids and not begin and news.finish_reason is None:
            return self._text(choice, news.text) if news.text else b""
        return begin + self._full(choice, news)

    def end(self) -> bytes:
        usage = b""
        if self._plan.include_usage:
            usage = self._head + b',"choices":[],"usage":' + orjson.dumps(self._tally.usage()) + b"}\n\n"
        return usage + DONE

    def _text(self, choice: int, text: str) -> bytes:
        return self._text_heads[choice] + orjson.dumps(text) + self._plain_tail + self._usage() + b"}\n\n"

    def _usage(self) -> bytes:
        if self._plan.continuous_usage:
            return b',"usage":' + orjson.dumps(self._tally.usage())
        return b',"usage":null' if self._plan.include_usage else b""

    def _begin(self, choice: int, prompt: int) -> bytes:
        """The role chunk, and the prompt's ids where they were asked for."""
        self._begun.add(choice)
        ids = self._plan.prompts[prompt].ids if self._plan.return_token_ids else None
        if self._shape.role:
            return self._event(choice, self._shape.role, _Extras(prompt_ids=ids))
        if ids is not None:
            return self._event(choice, self._shape.empty, _Extras(prompt_ids=ids, token_ids=()))
        return b""

    def _echo(self, prompt: int, begun: Begun) -> bytes:
        """The prompt in front of each choice."""
        asked, events = self._plan.prompts[prompt], b""
        for choice in range(prompt * self._plan.n, (prompt + 1) * self._plan.n):
            ids, logprobs = asked.ids, None
            if self._logprobs is not None:
                positions = prompt_positions(len(ids), begun.prompt_logprobs)
                logprobs = self._logprobs.render(choice, ids, positions)
            text = self._shape.text_open + orjson.dumps(asked.text or "") + self._shape.text_close
            events += self._begin(choice, prompt) + self._event(choice, text, _Extras(logprobs))
        return events

    def _full(self, choice: int, delta: Delta) -> bytes:
        """An event for what arrived, and one for the finish."""
        events = b""
        ids = delta.token_ids if self._plan.return_token_ids else None
        logprobs = None
        if self._logprobs is not None and delta.logprobs:
            logprobs = self._logprobs.render(choice, delta.token_ids, delta.logprobs)
        if delta.text or ids or logprobs is not None:
            text = self._shape.text_open + orjson.dumps(delta.text) + self._shape.text_close
            events = self._event(choice, text, _Extras(logprobs, token_ids=ids))
        return events + (self._finish(choice, delta) if delta.finish_reason is not None else b"")

    def _finish(self, choice: int, delta: Delta) -> bytes:
        ids = () if self._plan.return_token_ids else None
        return self._event(choice, self._shape.empty, _Extras(finish=delta, token_ids=ids))

    def _event(self, choice: int, text: bytes, extras: _Extras = _NO_EXTRAS) -> bytes:
        ids = b',"prompt_token_ids":' + orjson.dumps(extras.prompt_ids) if extras.prompt_ids is not None else b""
        on_top, inside = (ids, b"") if self._shape.prompt_ids_on_top else (b"", ids)
        finish = extras.finish
        parts = [
            self._head, on_top, b',"choices":[{"index":%d,' % choice, text,
            b',"logprobs":', orjson.dumps(extras.logprobs),
            b',"finish_reason":', orjson.dumps(finish.finish_reason if finish else None),
            b',"stop_reason":' + orjson.dumps(finish.stop_reason) if finish else b"",
            b',"token_ids":' + orjson.dumps(extras.token_ids) if extras.token_ids is not None else b"",
            inside, b"}]", self._usage(), b"}\n\n",
        ]  # fmt: skip
        return b"".join(parts)
