"""Owns what workers are told to compute: a group's tokens and sampling, the ratio of its blend, and who may hold KV of it."""

from __future__ import annotations

from controller.blend_gate import BlendGate
from controller.blend_ratio import choose_ratio
from controller.blend_speeds import cost_of
from controller.dispatch import Group
from controller.fleet import Fleet
from controller.kv_blend import put_blend
from controller.live_request import LiveRequest
from controller.placement.decision import Pick
from controller.work_messages import dispatch_id, sampling_params
from kv_transfer.keys import tenant_digest
from pdserve.v1 import worker_pb2


class WorkOrders:
    def __init__(self, fleet: Fleet, blends: BlendGate) -> None:
        self._fleet = fleet
        self._blends = blends

    def order(self, group: Group, attempt: int, pick: Pick) -> worker_pb2.Work:
        """For the workers of `pick`, which is of this moment. The first one of a request settles the ratio of its blend. Raises
        InvalidRequest where it asks for a blend that has not passed for the model of these workers."""
        decode = self._fleet.record(pick.decode_worker)
        assert decode is not None, "picked from a snapshot of this moment"
        identity = decode.info.identity.digest
        self._check_blend(group.live, identity)
        self._choose_ratio(group.live, pick)
        work = _work(group, attempt, identity)
        self._name_source(work, pick)
        return work

    def _check_blend(self, live: LiveRequest, identity: bytes) -> None:
        """Once per model: a request that runs goes on, on that model, though its verdict is withdrawn."""
        if live.kv_blend is not None and live.blended_on != identity:
            self._blends.check_at(identity, live.kv_blend.recipe, live.request.cache_salt)
            live.blended_on = identity

    def _choose_ratio(self, live: LiveRequest, pick: Pick) -> None:
        """By what was measured where it is computed first."""
        if live.kv_blend is None or not live.kv_blend.undecided:
            return
        record = self._fleet.record(_computing(pick))
        assert record is not None, "picked from a snapshot of this moment"
        keys = live.chunk_keys(record.info.identity.digest)
        live.choose_ratio(choose_ratio(cost_of(live.kv_blend, keys, live.request.prompt_tokens, record)))

    def _name_source(self, work: worker_pb2.Work, pick: Pick) -> None:
        """Where whoever computes may pull KV from. Where the prompt's logprobs are asked for, all of it is computed."""
        if not work.block_hashes or work.sampling.HasField("prompt_logprobs"):
            return
        source = self._fleet.kv_source(_computing(pick), work.block_hashes)
        if source is not None:
            work.source.CopyFrom(source)


def _work(group: Group, attempt: int, identity: bytes) -> worker_pb2.Work:
    live, first = group.live, group.choices[0]
    token_ids = live.token_ids(first)
    sampling = sampling_params(live.request.sampling)
    if not live.lacks_prompt_logprobs:
        sampling.ClearField("prompt_logprobs")
    work = worker_pb2.Work(
        dispatch=dispatch_id(live.key, attempt),
        request_id=live.request.request_id,
        choices=group.choices,
        token_ids=token_ids,
        prompt_tokens=live.request.prompt_tokens,
        sampling=sampling,
        block_hashes=live.block_hashes(identity, token_ids),
        priority=live.request.priority,
        tenant=tenant_digest(live.request.cache_salt),
    )
    if live.kv_blend is not None:
        put_blend(work, live.kv_blend, live.chunk_keys(identity))
    return work


def _computing(pick: Pick) -> str:
    """The worker that computes the prompt."""
    return pick.prefill_worker if pick.kind == "split" else pick.decode_worker
