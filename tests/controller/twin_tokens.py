"""Owns the tokens of scripted workers: what each draws, and how batches of them leave it: in order, twice, swapped, or as its last.

A token depends on (prompt, seed, choice, index) alone, as with real engines, so that a disturbed run must bring the same ids as an
undisturbed one.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Protocol

from pdserve.v1 import types_pb2, worker_pb2
from tests.controller.twin_faults import Faults

SWAP_S = 0.02  # how long a batch is held back for the next one to overtake it


def token_of(prompt: bytes, seed: int, choice: int, index: int) -> int:
    """Printable ASCII, so that byte-sized ids are text."""
    digest = hashlib.blake2b(prompt, digest_size=8, key=f"{seed}/{choice}/{index}".encode()).digest()
    return 97 + digest[0] % 26


def tokens_of(prompt: bytes, seed: int, choice: int, count: int) -> list[int]:
    return [token_of(prompt, seed, choice, index) for index in range(count)]


def add_token(batch: worker_pb2.TokenBatch, work: worker_pb2.Work, choice: int, index: int) -> bool:
    """True if the choice ends with it."""
    prompt = work.token_ids[: work.prompt_tokens * 4]
    token = token_of(prompt, work.sampling.seed, choice, index)
    last = index + 1 >= work.sampling.max_tokens
    stops = token in work.sampling.stop_token_ids and index + 1 > work.sampling.min_tokens
    batch.request_keys.append(work.dispatch.request_key)
    batch.attempts.append(work.dispatch.attempt)
    batch.choices.append(choice)
    batch.indices.append(index)
    batch.token_ids.append(token)
    finish = types_pb2.FINISH_REASON_STOP if stops else types_pb2.FINISH_REASON_LENGTH if last else 0
    batch.finish_reasons.append(finish)  # type: ignore[arg-type]
    if work.sampling.HasField("logprobs"):
        batch.logprobs.append(types_pb2.TokenLogprobs(token_ids=[token], logprobs=[-float(index)]))
    return stops or last


class TokenHost(Protocol):
    """The worker whose tokens these are."""

    faults: Faults

    def tell(self, response: worker_pb2.SessionResponse) -> None: ...

    def break_stream(self) -> None: ...

    def die(self) -> None: ...


class TokenMouth:
    def __init__(self, host: TokenHost) -> None:
        self._host = host
        self._held_back: worker_pb2.SessionResponse | None = None
        self._tokens_sent = 0

    def tell(self, batch: worker_pb2.TokenBatch) -> None:
        response = worker_pb2.SessionResponse(tokens=batch)
        self._tokens_sent += len(batch.token_ids)
        if self._host.faults.reorder:
            if self._held_back is None:
                self._held_back = response
                asyncio.get_running_loop().call_later(SWAP_S, self._release)
                return
            self._host.tell(response)
            self._release()
        else:
            self._host.tell(response)
        if self._host.faults.duplicate:
            copy = worker_pb2.SessionResponse()
            copy.CopyFrom(response)
            self._host.tell(copy)
        self._break_if_due()

    def _release(self) -> None:
        if self._held_back is not None:
            held, self._held_back = self._held_back, None
            self._host.tell(held)

    def _break_if_due(self) -> None:
        faults = self._host.faults
        if faults.die_after_tokens is not None and self._tokens_sent >= faults.die_after_tokens:
            self._host.die()
        elif faults.reset_after_tokens is not None and self._tokens_sent >= faults.reset_after_tokens:
            faults.reset_after_tokens = None
            self._host.break_stream()
