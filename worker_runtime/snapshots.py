"""Owns the description of held dispatches in a WorkerSnapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.v1 import worker_pb2
from worker_runtime.dispatches import DispatchRecord
from worker_runtime.messages import dispatch_to_proto, sampling_to_proto


def held_dispatches(records: Iterable[DispatchRecord]) -> list[worker_pb2.HeldDispatch]:
    """All choices of each record, those that ended included: their tokens may be adopted too."""
    return [
        worker_pb2.HeldDispatch(
            dispatch=dispatch_to_proto(record.work.dispatch),
            request_id=record.work.request_id,
            choices=list(record.choices),
            next_index=[choice.next_index for choice in record.choices.values()],
            token_ids=record.work.token_ids,
            prompt_tokens=record.work.prompt_tokens,
            sampling=sampling_to_proto(record.work.sampling),
        )
        for record in records
    ]
