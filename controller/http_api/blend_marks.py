"""Owns which tokens of a tokenised prompt a body's `kv_blend` marks as chunks."""

from __future__ import annotations

from collections.abc import Sequence

from controller.http_api.blend_body import KvBlendBody
from controller.http_api.bodies import ChatBody, ChatMessage, CompletionBody, SamplingBody
from controller.http_api.context import ApiContext
from controller.http_api.prompts import TokenizedPrompt
from controller.http_api.sampling import Asked
from controller.kv_blend import Chunk, KvBlend, blend, check_prompt_logprobs, marked, separated
from pdserve.errors import InvalidRequest
from tokenization.tokenizer import ids_to_bytes

Span = tuple[int, int]


def check_blend(context: ApiContext, body: SamplingBody, asked: Asked, prompts: int) -> None:
    """What can be refused before a prompt is tokenised."""
    if body.kv_blend is None:
        return
    context.operations.blends.check(body.kv_blend.recipe, body.cache_salt or "")
    check_prompt_logprobs(asked.prompt_logprobs)
    if prompts > 1 and body.kv_blend.chunks is not None:
        raise InvalidRequest(
            "kv_blend.chunks: offsets belong to one prompt. Send one prompt, or mark the chunks by a separator.",
            param="kv_blend.chunks",
        )


async def completion_blends(
    context: ApiContext, body: CompletionBody, prompts: Sequence[TokenizedPrompt]
) -> list[KvBlend | None]:
    """One per prompt; None where nothing is to be blended. Raises InvalidRequest."""
    if body.kv_blend is None:
        return [None] * len(prompts)
    if body.kv_blend.chunks == "messages":
        raise InvalidRequest(
            'kv_blend.chunks: "messages" is for /v1/chat/completions. Give [[start, end], …] or a separator.',
            param="kv_blend.chunks",
        )
    return [await _blend(context, body.kv_blend, prompt) for prompt in prompts]


async def chat_blend(context: ApiContext, body: ChatBody, prompt: TokenizedPrompt) -> KvBlend | None:
    asked = body.kv_blend
    if asked is None or asked.chunks != "messages":
        return await _blend(context, asked, prompt) if asked is not None else None
    assert prompt.text is not None
    if len(prompt.token_ids) // 4 > context.limits.context_tokens:
        return None  # refused for its length further on; nobody should wait for its marks
    spans = message_spans(prompt.text, body.messages[:-1])
    offsets = await context.prompts.offsets(prompt.text, add_special_tokens=bool(body.add_special_tokens))
    return blend(asked.recipe, tokens_within(offsets, spans), len(offsets))


async def _blend(context: ApiContext, asked: KvBlendBody, prompt: TokenizedPrompt) -> KvBlend | None:
    tokens = len(prompt.token_ids) // 4
    if asked.separator is not None:
        return blend(asked.recipe, separated(prompt.token_ids, await _ids(context, asked.separator)), tokens)
    assert isinstance(asked.chunks, tuple)
    return blend(asked.recipe, marked(asked.chunks, tokens), tokens)


async def _ids(context: ApiContext, separator: str | tuple[int, ...]) -> bytes:
    return await context.prompts.plain(separator) if isinstance(separator, str) else ids_to_bytes(separator)


def message_spans(text: str, messages: Sequence[ChatMessage]) -> list[Span]:
    """Characters of each message's content in the rendered chat. Raises InvalidRequest where the template changed one."""
    spans: list[Span] = []
    at = 0
    for place, message in enumerate(messages):
        content = (message.content or "").strip()
        if not content:
            continue
        found = text.find(content, at)
        if found < 0:
            param = f"messages[{place}].content"
            raise InvalidRequest(
                f"{param}: the model's chat template does not repeat it as it is, so it cannot be a chunk. Mark chunks by "
                "a separator, or by offsets into the tokens that /tokenize gives.",
                param=param,
            )
        at = found + len(content)
        spans.append((found, at))
    return spans


def tokens_within(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[Chunk, ...]:
    """The tokens that lie wholly inside each span. offsets: characters of each token; (0, 0) for those without any."""
    chunks: list[Chunk] = []
    token, count = 0, len(offsets)
    for begin, end in spans:
        while token < count and (offsets[token][0] < begin or offsets[token][0] == offsets[token][1]):
            token += 1
        first = token
        while token < count and offsets[token][1] <= end and offsets[token][0] < offsets[token][1]:
            token += 1
        if token > first:
            chunks.append(Chunk(first, token))
    return tuple(chunks)
