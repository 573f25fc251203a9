"""Owns /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from controller.http_api.answer_plan import AnswerPlan
from controller.http_api.answers import ChatAnswer, CompletionAnswer
from controller.http_api.blend_marks import chat_blend, check_blend, completion_blends
from controller.http_api.bodies import ChatBody, CompletionBody, SamplingBody
from controller.http_api.chunks import CHAT_SHAPE, COMPLETION_SHAPE, ChunkStream
from controller.http_api.context import ApiContext
from controller.http_api.delivery import Delivery
from controller.http_api.json_body import read_body
from controller.http_api.logprob_formats import ChatLogprobs, LegacyLogprobs, TokenNames
from controller.http_api.openapi import KEYED, WITH_BODY, error_answers, json_body, streamed_too
from controller.http_api.prompts import TokenizedPrompt
from controller.http_api.sampling import Asked, asked_of_chat, asked_of_completion, check_counts, resolve
from controller.http_api.served_model import check_model
from controller.http_api.whole_answer import CHAT_ANSWER, COMPLETION_ANSWER, WholeAnswer
from controller.kv_blend import KvBlend
from controller.request import GenerationRequest

PROMPT_TAIL_TOKENS = 4  # the longest character has four bytes
_STATUSES = error_answers(*WITH_BODY, *KEYED, 404, 429, 499, 503)


def inference_router(context: ApiContext) -> APIRouter:
    router = APIRouter(tags=["inference"])

    @router.post(
        "/v1/completions",
        responses={**_STATUSES, **streamed_too(CompletionAnswer)},
        openapi_extra=json_body(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        """Continues each prompt, n times."""
        body = await read_body(request, CompletionBody)
        check_model(body.model, context.model)
        check_counts(body, len(body.prompt.prompts), context.limits)
        asked = asked_of_completion(body)
        special = body.add_special_tokens is not False
        check_blend(context, body, asked, len(body.prompt.prompts))
        prompts = await context.prompts.completion(body.prompt, add_special_tokens=special)
        blends = await completion_blends(context, body, prompts)
        if body.echo:
            prompts = [_with_text(context, prompt) for prompt in prompts]
        return _complete(context, body, asked, _plan(context, request, "cmpl-", body, prompts), blends)

    @router.post(
        "/v1/chat/completions",
        responses={**_STATUSES, **streamed_too(ChatAnswer)},
        openapi_extra=json_body(ChatBody),
    )
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, n times."""
        body = await read_body(request, ChatBody)
        check_model(body.model, context.model)
        check_counts(body, 1, context.limits)
        asked = asked_of_chat(body)
        check_blend(context, body, asked, 1)
        prompt = await context.prompts.chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
        blend = await chat_blend(context, body, prompt)
        return _chat(context, body, asked, _plan(context, request, "chatcmpl-", body, [prompt]), blend)

    return router


def _complete(
    context: ApiContext, body: CompletionBody, asked: Asked, plan: AnswerPlan, blends: Sequence[KvBlend | None]
) -> Response:
    plan = replace(plan, echo=bool(body.echo), hide_output=body.max_tokens == 0, logprobs=body.logprobs is not None)
    logprobs = None
    if plan.logprobs:
        tails = [
            () if plan.echo else prompt.ids[-PROMPT_TAIL_TOKENS:] for prompt in plan.prompts for _ in range(plan.n)
        ]
        logprobs = LegacyLogprobs(TokenNames(context.model.tokenizer, plan.tokens_as_ids), tails)
    delivery = _delivery(context, body, asked, plan, blends)
    if body.stream:
        return delivery.stream(ChunkStream(plan, COMPLETION_SHAPE, logprobs))
    return delivery.whole(WholeAnswer(plan, COMPLETION_ANSWER, logprobs))


def _chat(context: ApiContext, body: ChatBody, asked: Asked, plan: AnswerPlan, blend: KvBlend | None) -> Response:
    plan = replace(plan, logprobs=bool(body.logprobs))
    logprobs = None
    if plan.logprobs:
        logprobs = ChatLogprobs(TokenNames(context.model.tokenizer, plan.tokens_as_ids), body.top_logprobs or 0)
    delivery = _delivery(context, body, asked, plan, [blend])
    if body.stream:
        return delivery.stream(ChunkStream(plan, CHAT_SHAPE, logprobs))
    return delivery.whole(WholeAnswer(plan, CHAT_ANSWER, logprobs))


def _with_text(context: ApiContext, prompt: TokenizedPrompt) -> TokenizedPrompt:
    """The echo of a prompt that came as ids is their text."""
    return prompt if prompt.text is not None else replace(prompt, text=context.model.tokenizer.decode(prompt.ids))


def _plan(
    context: ApiContext, request: Request, prefix: str, body: SamplingBody, prompts: Sequence[TokenizedPrompt]
) -> AnswerPlan:
    options = body.stream_options
    return AnswerPlan(
        answer_id=prefix + request.scope["state"]["run_id"],
        created_s=int(context.unix_now()),
        model=context.model.name,
        prompts=tuple(prompts),
        n=body.n or 1,
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        return_token_ids=bool(body.return_token_ids),
        include_usage=bool(options and (options.include_usage or options.continuous_usage_stats)),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _delivery(
    context: ApiContext, body: SamplingBody, asked: Asked, plan: AnswerPlan, blends: Sequence[KvBlend | None]
) -> Delivery:
    run_id = plan.answer_id.partition("-")[2]
    requests = [
        GenerationRequest(
            request_id=run_id if len(plan.prompts) == 1 else f"{run_id}-{place}",
            token_ids=prompt.token_ids,
            sampling=resolve(body, asked, len(prompt.token_ids) // 4, context.limits, context.mint_seed),
            n=plan.n,
            stop=body.stop,
            include_stop_text=bool(body.include_stop_str_in_output),
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            kv_blend=blend,
        )
        for place, (prompt, blend) in enumerate(zip(plan.prompts, blends, strict=True))
    ]
    return Delivery(context.generator, requests, context.keepalive_s)
