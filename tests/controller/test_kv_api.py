"""KvService over a real gRPC server, with scripted workers behind it."""

from __future__ import annotations

import grpc
import pytest

from kv_transfer.keys import HASH_BYTES
from pdserve.v1 import kv_pb2, kv_pb2_grpc, worker_pb2
from service_kit.api_keys import ApiKeys
from tests.controller.cluster_twin import PROMPT
from tests.controller.test_grpc_api import KEY, Api, api, reason
from tests.controller.test_kv_desk import UNITS, answers, one_page_each

PAGE_KEY = b"k" * HASH_BYTES


async def with_tiers(served: Api) -> kv_pb2_grpc.KvServiceAsyncStub:
    for worker in served.twin.workers.values():
        worker.tiers = [worker_pb2.TierReport(tier="host", verify_failures={"checksum": 2}, pages=3)]
        answers(worker, one_page_each)
    await served.twin.until(
        lambda: all(record.load.tiers for record in served.twin.fleet.records()), "the tiers are reported"
    )
    return kv_pb2_grpc.KvServiceStub(served.channel)


async def test_every_call_answers_what_the_desk_says() -> None:
    async with api() as served:
        stub = await with_tiers(served)
        stat = await stub.Stat(kv_pb2.KvStatRequest())
        assert [worker.worker_id for worker in stat.workers] == ["d0", "d1", "p0", "p1"]
        (tier,) = stat.workers[0].tiers
        assert (tier.pages, dict(tier.verify_failures)) == (3, {"checksum": 2})
        pages = await stub.Pages(kv_pb2.KvPagesRequest(selection=kv_pb2.KvSelection(worker_id="p1")))
        assert [(each.worker_id, each.pages[0].key) for each in pages.workers] == [("p1", PAGE_KEY)]
        explained = await stub.Explain(kv_pb2.KvExplainRequest(prompt=kv_pb2.KvPrompt(token_ids=PROMPT)))
        assert (explained.prompt_tokens, explained.keyed_tokens, len(explained.workers)) == (50, 48, 4)
        pin = await stub.Pin(
            kv_pb2.KvPinRequest(selection=kv_pb2.KvSelection(prompt=kv_pb2.KvPrompt(token_ids=PROMPT)), hold_s=5)
        )
        assert sum(each.outcome.pages for each in pin.outcomes) == 4
        last = served.twin.workers["p0"].commands[-1].kv_command
        assert (last.keys, last.hold_ms) == (UNITS, 5000)
        flush = await stub.Flush(kv_pb2.KvFlushRequest(selection=kv_pb2.KvSelection(tier="host")))
        assert [each.outcome.tier for each in flush.outcomes] == ["host"] * 4
        verify = await stub.Verify(kv_pb2.KvVerifyRequest(after=PAGE_KEY))
        assert [each.worker_id for each in verify.outcomes] == ["d0", "d1", "p0", "p1"]
        assert served.twin.workers["d1"].commands[-1].kv_command.after == PAGE_KEY


async def test_a_text_prompt_is_tokenised() -> None:
    async with api() as served:
        stub = await with_tiers(served)
        explained = await stub.Explain(kv_pb2.KvExplainRequest(prompt=kv_pb2.KvPrompt(text="x" * 40)))
        assert (explained.prompt_tokens, explained.keyed_tokens) == (40, 32)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (kv_pb2.KvSelection(worker_id="nobody"), grpc.StatusCode.NOT_FOUND),
        (kv_pb2.KvSelection(keys=[b"short"]), grpc.StatusCode.INVALID_ARGUMENT),
        (kv_pb2.KvSelection(prompt=kv_pb2.KvPrompt(token_ids=b"abc")), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_errors_are_mapped_like_those_of_the_other_services(
    asked: kv_pb2.KvSelection, code: grpc.StatusCode
) -> None:
    async with api() as served:
        stub = await with_tiers(served)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Flush(kv_pb2.KvFlushRequest(selection=asked))
        assert raised.value.code() == code
        assert reason(raised.value) in ("not_found", "invalid_request_error")


async def test_a_key_is_needed_where_keys_are_set() -> None:
    async with api(ApiKeys((KEY.encode(),)), workers=False) as served:
        stub = kv_pb2_grpc.KvServiceStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Stat(kv_pb2.KvStatRequest())
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await stub.Stat(kv_pb2.KvStatRequest(), metadata=(("authorization", f"Bearer {KEY}"),))
