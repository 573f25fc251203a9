"""Owns how prompts become token ids: chat template, tokenizer in a thread pool, vocabulary bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from controller.http_api.bodies import ChatMessage
from controller.http_api.field_types import PromptInput
from controller.operations import ModelInfo
from pdserve.errors import InvalidRequest
from tokenization.chat_template import Message
from tokenization.tokenizer import ids_from_bytes, ids_to_bytes

INLINE_CHARS = 1000  # tokenised in well under a millisecond, less than two thread switches of a busy process


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """token_ids: int32[n] little-endian. `text` is None where the client sent ids."""

    token_ids: bytes
    text: str | None

    @property
    def ids(self) -> list[int]:
        return ids_from_bytes(self.token_ids)


class PromptTokenizer:
    """Turns bodies into token ids without stalling the event loop."""

    def __init__(self, model: ModelInfo, threads: int) -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def completion(self, prompt: PromptInput, *, add_special_tokens: bool) -> list[TokenizedPrompt]:
        """In the order of the request. Raises InvalidRequest for empty prompts and ids outside the vocabulary."""
        tokenized = [await self._one(one, add_special_tokens=add_special_tokens) for one in prompt.prompts]
        for place, one in enumerate(tokenized):
            if not one.token_ids:
                param = "prompt" if len(tokenized) == 1 else f"prompt[{place}]"
                raise InvalidRequest(f"{param}: the prompt has no tokens. Send at least one character.", param=param)
        return tokenized

    async def chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool, add_special_tokens: bool
    ) -> TokenizedPrompt:
        """Raises InvalidRequest in the template's words if it refuses the messages."""
        plain = [self._message(message) for message in messages]
        size = sum(len(message.content or "") for message in messages)
        if size <= INLINE_CHARS:
            prompt = self._render(plain, add_generation_prompt, add_special_tokens)
        else:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(
                self._pool, self._render, plain, add_generation_prompt, add_special_tokens
            )
        if not prompt.token_ids:
            raise InvalidRequest("messages: the chat has no tokens. Send at least one character.", param="messages")
        return prompt

    async def plain(self, text: str) -> bytes:
        """Token ids of a piece of text, int32 little-endian, without special tokens around it."""
        return (await self._one(text, add_special_tokens=False)).token_ids

    async def offsets(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int]]:
        """Per token of `text`, the characters that it stands for: [start, end)."""
        loop = asyncio.get_running_loop()
        offsets = partial(self._model.tokenizer.offsets, text, add_special_tokens=add_special_tokens)
        return await loop.run_in_executor(self._pool, offsets)

    async def _one(self, prompt: str | list[int], *, add_special_tokens: bool) -> TokenizedPrompt:
        if isinstance(prompt, list):
            self._model.tokenizer.check_ids(prompt, param="prompt")
            return TokenizedPrompt(ids_to_bytes(prompt), None)
        if len(prompt) <= INLINE_CHARS:
            return self._encode(prompt, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, prompt, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> TokenizedPrompt:
        return TokenizedPrompt(self._model.tokenizer.encode(text, add_special_tokens=add_special_tokens), text)

    def _render(
        self, messages: list[Message], add_generation_prompt: bool, add_special_tokens: bool
    ) -> TokenizedPrompt:
        text = self._model.chat_template.render(messages, add_generation_prompt)
        return self._encode(text, add_special_tokens)

    def _message(self, message: ChatMessage) -> Message:
        role: str = message.role
        if role == "developer" and not self._model.chat_template.mentions(role):
            role = "system"  # OpenAI's newer name for it, which few templates know
        plain: dict[str, object] = {"role": role, "content": message.content or ""}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        return plain
