"""Owns the commands to workers as protobuf: work, reservations, prefills, cancels. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from controller.request import SamplingSpec
from pdserve.errors import PdserveError, error_from_reason
from pdserve.v1 import types_pb2, worker_pb2

UINT64 = 2**64 - 1


def dispatch_id(request_key: int, attempt: int) -> types_pb2.DispatchId:
    return types_pb2.DispatchId(request_key=request_key, attempt=attempt)


def sampling_params(spec: SamplingSpec) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        logit_bias=dict(spec.logit_bias),
        seed=spec.seed & UINT64,
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        ignore_eos=spec.ignore_eos,
        stop_token_ids=spec.stop_token_ids,
        logprobs=spec.logprobs,
        prompt_logprobs=spec.prompt_logprobs,
    )


def reserve(work: worker_pb2.Work, transport: str) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(reserve=worker_pb2.Reserve(work=work, transport=transport))


def prefill(work: worker_pb2.Work, grant: worker_pb2.Grant, decode_address: str) -> worker_pb2.SessionRequest:
    message = worker_pb2.Prefill(work=work, grant=grant, decode_address=decode_address)
    return worker_pb2.SessionRequest(prefill=message)


def generate(work: worker_pb2.Work) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(generate=worker_pb2.Generate(work=work))


def cancel(request_key: int, attempt: int, choices: Iterable[int] = ()) -> worker_pb2.SessionRequest:
    """Empty `choices` = all of the dispatch."""
    message = worker_pb2.CancelDispatch(dispatch=dispatch_id(request_key, attempt), choices=choices)
    return worker_pb2.SessionRequest(cancel=message)


def refusal_error(refusal: worker_pb2.Refusal) -> PdserveError:
    return error_from_reason(refusal.reason, refusal.message)
