"""Owns the gRPC services of the controller: InferenceService for programs, MembershipService for workers.

Errors are raised as they are: the server's interceptors map them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Protocol, TypeAlias, cast

import grpc

from controller.blend_gate import BlendGate
from controller.blend_request import recipe_of
from controller.fleet import Fleet
from controller.generate_request import GenerateLimits, check_head, generation_request
from controller.operations import ModelInfo
from controller.request import Begun, Delta, FinishReason, GenerationRequest, Generator, Logprobs
from pdserve.errors import Cancelled, InvalidRequest
from pdserve.v1 import inference_pb2, inference_pb2_grpc, membership_pb2, membership_pb2_grpc, types_pb2
from service_kit.config import ControllerConfig
from service_kit.grpc_errors import status_metadata
from service_kit.logs import get_logger

log = get_logger(__name__)

_FINISH: dict[FinishReason | None, types_pb2.FinishReason.ValueType] = {
    None: types_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
    "cancelled": types_pb2.FINISH_REASON_CANCELLED,
}

GenerateContext: TypeAlias = "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"


class PromptTokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> bytes: ...


class InferenceApi(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(
        self,
        generator: Generator,
        tokenizer: PromptTokenizer,
        limits: GenerateLimits,
        blends: BlendGate,
        threads: ThreadPoolExecutor,
        client_stall_s: float,
    ) -> None:
        """client_stall_s: a client that takes no message for so long is given up."""
        self._generator = generator
        self._blends = blends
        self._tokenizer = tokenizer
        self._limits = limits
        self._threads = threads
        self._client_stall_s = client_stall_s

    # gRPC takes a coroutine that writes as well; the stubs' base class knows generators alone, where a write cannot be given up.
    async def Generate(  # type: ignore[override]  # noqa: N802 (the name is gRPC's)
        self, request: inference_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        generation = await self._generation(request, context.time_remaining())
        async with aclosing(self._responses(generation)) as responses:
            async for response in responses:
                if not await self._taken(context, response):
                    break
            else:
                return
        # Here, where the workers are free already: it waits until the client reads on, and fails if that one goes.
        error = Cancelled(f"You took nothing of the answer for {self._client_stall_s:g} s.")
        with suppress(grpc.aio.BaseError):
            await context.abort(error.grpc_status, error.message, status_metadata(error))

    async def _taken(self, context: GenerateContext, response: inference_pb2.GenerateResponse) -> bool:
        try:
            async with asyncio.timeout(self._client_stall_s):
                await context.write(response)
        except TimeoutError:
            log.warning("client_stalled", request_id=response.request_id)
            return False
        return True

    async def _responses(self, generation: GenerationRequest) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        completion_tokens = cached_tokens = blended_tokens = 0
        ended = 0
        # The protocol says that generators can be closed; its type does not.
        stream = cast(AsyncGenerator[Begun | Delta, None], self._generator.generate(generation))
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Begun):
                    cached_tokens, blended_tokens = item.cached_tokens, item.blended_tokens
                    yield _begun(generation.request_id, item)
                    continue
                completion_tokens += len(item.token_ids)
                ended += item.finish_reason is not None
                response = inference_pb2.GenerateResponse(request_id=generation.request_id, choices=[_delta(item)])
                if ended == generation.n:
                    skipped = sum(generation.next_index)
                    response.usage.prompt_tokens = generation.prompt_tokens
                    response.usage.completion_tokens = completion_tokens + skipped
                    response.usage.cached_tokens = cached_tokens
                    response.usage.blended_tokens = blended_tokens
                yield response

    async def Cancel(  # noqa: N802 (the name is gRPC's)
        self,
        request: inference_pb2.CancelRequest,
        context: grpc.aio.ServicerContext[inference_pb2.CancelRequest, inference_pb2.CancelResponse],
    ) -> inference_pb2.CancelResponse:
        return inference_pb2.CancelResponse(found=await self._generator.cancel(request.request_id))

    async def _generation(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> GenerationRequest:
        check_head(message, self._limits)
        if message.HasField("kv_blend"):
            self._blends.check(recipe_of(message.kv_blend), message.cache_salt)
        token_ids = message.token_ids
        if message.WhichOneof("prompt") == "text":
            token_ids = await self._encode(message.text, add_special_tokens=True)
            if not token_ids:
                raise InvalidRequest("text: has no token. Give a prompt.", param="text")
        if message.kv_blend.WhichOneof("separator") == "separator_text":
            separator = await self._encode(message.kv_blend.separator_text, add_special_tokens=False)
            message.kv_blend.separator_ids = separator
        request_id = message.request_id or f"gen-{secrets.token_hex(12)}"
        return generation_request(message, request_id, token_ids, self._limits, timeout_s)

    async def _encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


class MembershipApi(membership_pb2_grpc.MembershipServiceServicer):
    def __init__(self, fleet: Fleet, controller_id: str, lease_s: float) -> None:
        self._fleet = fleet
        self._controller_id = controller_id
        self._lease_ms = round(lease_s * 1000)

    async def RegisterWorker(  # noqa: N802 (the name is gRPC's)
        self,
        request: membership_pb2.RegisterWorkerRequest,
        context: grpc.aio.ServicerContext[membership_pb2.RegisterWorkerRequest, membership_pb2.RegisterWorkerResponse],
    ) -> membership_pb2.RegisterWorkerResponse:
        self._fleet.register(request.worker)
        return membership_pb2.RegisterWorkerResponse(controller_id=self._controller_id, lease_ms=self._lease_ms)


def generate_limits(model: ModelInfo, config: ControllerConfig) -> GenerateLimits:
    vocab_size = model.tokenizer.vocab_size
    return GenerateLimits(model.name, model.max_context_tokens, vocab_size, config.max_choices)


def _begun(request_id: str, begun: Begun) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(request_id=request_id, prompt_logprobs=_rows(begun.prompt_logprobs))


def _delta(delta: Delta) -> inference_pb2.ChoiceDelta:
    return inference_pb2.ChoiceDelta(
        choice=delta.choice,
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=_rows(delta.logprobs),
        finish_reason=_FINISH[delta.finish_reason],
        stop_reason="" if delta.stop_reason is None else str(delta.stop_reason),
    )


def _rows(rows: Sequence[Logprobs]) -> list[types_pb2.TokenLogprobs]:
    return [types_pb2.TokenLogprobs(token_ids=row.token_ids, logprobs=row.logprobs) for row in rows]
