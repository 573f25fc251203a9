"""Owns /v1/models, /tokenize and /detokenize (the latter two in vLLM's shapes)."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from controller.http_api.answers import DetokenizeAnswer, ModelAnswer, ModelsAnswer, TokenizeAnswer
from controller.http_api.bodies import DetokenizeBody, TokenizeBody
from controller.http_api.context import ApiContext
from controller.http_api.field_types import PromptInput
from controller.http_api.json_body import read_body
from controller.http_api.openapi import KEYED, WITH_BODY, error_answers, json_body
from controller.http_api.prompts import TokenizedPrompt
from controller.http_api.served_model import check_model
from controller.operations import ModelInfo
from tokenization.tokenizer import ids_from_bytes


def model_router(context: ApiContext) -> APIRouter:
    router = APIRouter(tags=["models"])
    described = _describe(context.model)

    @router.get("/v1/models", responses={200: {"model": ModelsAnswer}, **error_answers(*KEYED)})
    async def models() -> Response:
        """The served models: one."""
        return _json({"object": "list", "data": [described]})

    @router.get("/v1/models/{model_id:path}", responses={200: {"model": ModelAnswer}, **error_answers(*KEYED, 404)})
    async def model(model_id: str) -> Response:
        """One served model."""
        check_model(model_id, context.model)
        return _json(described)

    @router.post(
        "/tokenize",
        responses={200: {"model": TokenizeAnswer}, **error_answers(*WITH_BODY, *KEYED, 404)},
        openapi_extra=json_body(TokenizeBody),
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of a rendered chat."""
        body = await read_body(request, TokenizeBody)
        check_model(body.model, context.model)
        prompt = await _tokenized(context, body)
        ids = ids_from_bytes(prompt.token_ids)
        names = [context.model.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        limit = context.model.max_context_tokens
        return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names})

    @router.post(
        "/detokenize",
        responses={200: {"model": DetokenizeAnswer}, **error_answers(*WITH_BODY, *KEYED, 404)},
        openapi_extra=json_body(DetokenizeBody),
    )
    async def detokenize(request: Request) -> Response:
        """Text of token ids, special tokens included."""
        body = await read_body(request, DetokenizeBody)
        check_model(body.model, context.model)
        return _json({"prompt": context.model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return router


async def _tokenized(context: ApiContext, body: TokenizeBody) -> TokenizedPrompt:
    if body.messages is not None:
        return await context.prompts.chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
    if not body.prompt:
        return TokenizedPrompt(b"", "")
    special = body.add_special_tokens is not False
    return (await context.prompts.completion(PromptInput((body.prompt,)), add_special_tokens=special))[0]


def _describe(model: ModelInfo) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "pdserve",
        "max_model_len": model.max_context_tokens,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
