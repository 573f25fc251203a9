"""Owns the TokenBatch messages: the tokens of one engine step, or those that an adopter lacks, in columns. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.protocol import StepTokens
from pdserve.v1 import types_pb2, worker_pb2
from worker_runtime.dispatches import UNFINISHED, DispatchRecord
from worker_runtime.messages import logprobs_to_proto

_REASONS = (
    types_pb2.FINISH_REASON_UNSPECIFIED,
    types_pb2.FINISH_REASON_STOP,
    types_pb2.FINISH_REASON_LENGTH,
    types_pb2.FINISH_REASON_CANCELLED,
)


def token_batch(event: StepTokens, columns: Sequence[int]) -> worker_pb2.TokenBatch:
    """`columns` of the step; as one owner usually has all of them, that case copies whole tuples."""
    if len(columns) < len(event.token_ids):
        event = _picked(event, columns)
    return worker_pb2.TokenBatch(
        step=event.step,
        request_keys=event.request_keys,
        attempts=event.attempts,
        choices=event.choices,
        indices=event.indices,
        token_ids=event.token_ids,
        finish_reasons=[_REASONS[finish] for finish in event.finish],
        logprobs=[logprobs_to_proto(row) for row in event.logprobs] if any(event.logprobs) else [],
    )


def replayed_batch(record: DispatchRecord, next_index: Mapping[int, int]) -> worker_pb2.TokenBatch:
    """Each choice's tokens from its next index on. Tokens that came with the work have no logprobs any more."""
    batch = worker_pb2.TokenBatch()
    accepted = record.accepted_tokens()
    for choice, start in next_index.items():
        held = record.choices[choice]
        for index in range(start, held.next_index):
            kept = index - held.first_index
            finish = held.finish if index == held.next_index - 1 else UNFINISHED
            batch.request_keys.append(record.work.dispatch.request_key)
            batch.attempts.append(record.work.dispatch.attempt)
            batch.choices.append(choice)
            batch.indices.append(index)
            batch.token_ids.append(held.token_ids[kept] if kept >= 0 else accepted[index])
            batch.finish_reasons.append(_REASONS[finish])
            batch.logprobs.append(logprobs_to_proto(held.logprobs[kept] if 0 <= kept < len(held.logprobs) else None))
    return batch


def _picked(event: StepTokens, columns: Sequence[int]) -> StepTokens:
    return StepTokens(
        step=event.step,
        request_keys=tuple(event.request_keys[column] for column in columns),
        attempts=tuple(event.attempts[column] for column in columns),
        choices=tuple(event.choices[column] for column in columns),
        indices=tuple(event.indices[column] for column in columns),
        token_ids=tuple(event.token_ids[column] for column in columns),
        finish=tuple(event.finish[column] for column in columns),
        logprobs=tuple(event.logprobs[column] for column in columns) if event.logprobs else (),
    )
