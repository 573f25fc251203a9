"""Owns the session commands that tests send."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kv_transfer.keys import chain_hashes
from pdserve.v1 import types_pb2, worker_pb2

ROOT = b"r" * 32


def dispatch(key: int, attempt: int = 1) -> types_pb2.DispatchId:
    return types_pb2.DispatchId(request_key=key, attempt=attempt)


def work(
    key: int,
    prompt: Sequence[int],
    *,
    max_tokens: int = 8,
    choices: Sequence[int] = (0,),
    temperature: float = 0.0,
    root: bytes = ROOT,
) -> worker_pb2.Work:
    token_ids = array("i", prompt).tobytes()
    return worker_pb2.Work(
        dispatch=dispatch(key),
        request_id=f"r{key}",
        choices=choices,
        token_ids=token_ids,
        prompt_tokens=len(prompt),
        sampling=types_pb2.SamplingParams(
            temperature=temperature, seed=7, max_tokens=max_tokens, ignore_eos=True, top_p=1.0
        ),
        block_hashes=chain_hashes(root, token_ids),
    )


def generate(work: worker_pb2.Work) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(generate=worker_pb2.Generate(work=work))


def reserve(work: worker_pb2.Work, transport: str = "tcp") -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(reserve=worker_pb2.Reserve(work=work, transport=transport))


def prefill(work: worker_pb2.Work, grant: worker_pb2.Grant, decode_address: str) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(prefill=worker_pb2.Prefill(work=work, grant=grant, decode_address=decode_address))


def cancel(key: int, choices: Sequence[int] = ()) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(cancel=worker_pb2.CancelDispatch(dispatch=dispatch(key), choices=choices))
