"""InferenceService and MembershipService over a real gRPC server, with scripted workers behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

from controller.blend_gate import BlendGate
from controller.generate_request import GenerateLimits
from controller.grpc_api import InferenceApi, MembershipApi
from controller.grpc_endpoint import GrpcEndpoint
from controller.kv_api import KvApi
from pdserve.v1 import inference_pb2, inference_pb2_grpc, membership_pb2, membership_pb2_grpc, types_pb2
from service_kit.api_keys import ApiKeys
from service_kit.config import BlendSetting, ClusterConfig
from tests.controller.blend_twins import open_gate
from tests.controller.cluster_twin import PROMPT, ClusterTwin, cluster
from tests.controller.twin_tokens import tokens_of

KEY = "sk-test-12345"


class ByteTokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        return b"".join(byte.to_bytes(4, "little") for byte in text.encode())


@dataclass
class Api:
    twin: ClusterTwin
    blends: BlendGate
    channel: grpc.aio.Channel

    def message(self, max_tokens: int = 20) -> inference_pb2.GenerateRequest:
        asked = inference_pb2.GenerateRequest(token_ids=PROMPT)
        asked.sampling.max_tokens = max_tokens
        asked.sampling.seed = 3
        return asked

    def generate(
        self, asked: inference_pb2.GenerateRequest, timeout_s: float = 10.0, key: str = ""
    ) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        metadata = (("authorization", f"Bearer {key}"),) if key else None
        return stub.Generate(asked, timeout=timeout_s, metadata=metadata)

    async def collect(self, asked: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
        return [response async for response in self.generate(asked)]


@asynccontextmanager
async def api(
    keys: ApiKeys | None = None,
    *,
    workers: bool = True,
    blend_setting: BlendSetting = "on",
    client_stall_s: float = 60.0,
    channel_options: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[Api]:
    async with cluster(grace_s=0.2) as twin:
        if workers:
            await twin.square()
        endpoint = GrpcEndpoint(ClusterConfig(), keys or ApiKeys())
        blends = open_gate(blend_setting)
        limits = GenerateLimits("tiny", 4096, 256, 4)
        with ThreadPoolExecutor(1) as threads:
            inference = InferenceApi(twin.service, ByteTokenizer(), limits, blends, threads, client_stall_s)
            membership = MembershipApi(twin.fleet, "controller-under-test", 2.0)
            kv = KvApi(twin.desk.kv, ByteTokenizer(), threads)
            address = await endpoint.start(inference, membership, kv)
            async with grpc.aio.insecure_channel(address, channel_options) as channel:
                yield Api(twin, blends, channel)
            await endpoint.close()


def ids(responses: Sequence[inference_pb2.GenerateResponse], choice: int = 0) -> list[int]:
    return [
        token
        for response in responses
        for delta in response.choices
        if delta.choice == choice
        for token in delta.token_ids
    ]


def reason(error: grpc.aio.AioRpcError) -> str:
    metadata = error.trailing_metadata()
    assert isinstance(metadata, grpc.aio.Metadata)
    return str(metadata["pdserve-reason"])


async def read_to_end(
    call: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
) -> None:
    while await call.read():
        pass


async def test_a_stream_begins_at_once_and_ends_with_the_usage() -> None:
    async with api() as served:
        responses = await served.collect(served.message())
        assert ids(responses) == tokens_of(PROMPT, 3, 0, 20)
        assert not responses[0].choices
        assert responses[-1].choices[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
        usage = responses[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (50, 20, 16)
        assert len({response.request_id for response in responses}) == 1


async def test_text_prompts_are_tokenised_and_texts_come_back() -> None:
    async with api() as served:
        asked = served.message(8)
        asked.text = "ab"
        responses = await served.collect(asked)
        prompt = ByteTokenizer().encode("ab", add_special_tokens=True)
        assert (
            "".join(delta.text for response in responses for delta in response.choices)
            == bytes(tokens_of(prompt, 3, 0, 8)).decode()
        )


async def test_chunks_of_a_text_are_marked_by_a_separator_and_counted_in_the_usage() -> None:
    async with api() as served:
        asked = served.message(4)
        asked.text = "a" * 20 + "##" + "b" * 30 + "##" + "question"
        asked.kv_blend.separator_text = "##"
        responses = await served.collect(asked)
        assert responses[-1].usage.blended_tokens == 50
        asked.text, asked.request_id = "no chunk here", "none"
        with pytest.raises(grpc.aio.AioRpcError, match="do not occur"):
            await served.collect(asked)


async def test_a_blend_that_the_gate_does_not_allow_is_refused_but_for_the_check_that_runs() -> None:
    async with api(blend_setting="verified") as served:
        asked = served.message(4)
        asked.kv_blend.chunks.add(start=0, end=20)
        with pytest.raises(grpc.aio.AioRpcError, match=r"pdserve verify --blend") as caught:
            await served.collect(asked)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        asked.cache_salt = served.blends.begin_trial().cache_salt
        assert (await served.collect(asked))[-1].usage.blended_tokens == 20


async def test_choices_logprobs_and_skipped_text() -> None:
    async with api() as served:
        asked = served.message(5)
        asked.n, asked.skip_text = 2, True
        asked.sampling.logprobs = 0
        asked.sampling.prompt_logprobs = 0
        responses = await served.collect(asked)
        assert len(responses[0].prompt_logprobs) == 49
        assert [ids(responses, choice) for choice in (0, 1)] == [tokens_of(PROMPT, 3, choice, 5) for choice in (0, 1)]
        deltas = [delta for response in responses for delta in response.choices]
        assert not any(delta.text for delta in deltas)
        assert sum(len(delta.logprobs) for delta in deltas) == 10


async def test_a_forced_route_is_passed_on() -> None:
    async with api() as served:
        asked = served.message(5)
        asked.request_id = "routed"
        asked.route.prefill_worker, asked.route.decode_worker, asked.route.transport = "p1", "d1", "tcp"
        await served.collect(asked)
        timeline = served.twin.desk.request("routed")
        assert timeline is not None
        assert (timeline.summary.prefill_worker, timeline.summary.decode_worker) == ("p1", "d1")


async def test_errors_carry_status_reason_and_parameter() -> None:
    async with api() as served:
        asked = served.message()
        asked.n = 5
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.collect(asked)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert reason(caught.value) == "invalid_request_error"
        asked = served.message()
        asked.model = "other"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.collect(asked)
        assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.NOT_FOUND, "model_not_found")


async def test_without_workers_the_call_is_unavailable() -> None:
    async with api(workers=False) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.collect(served.message())
        assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "no_decode_workers")


async def test_a_key_is_asked_of_programs_but_not_of_workers() -> None:
    async with api(ApiKeys((KEY.encode(),))) as served:
        for key in ("", "wrong-key"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.generate(served.message(), key=key).read()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert [response async for response in served.generate(served.message(), key=KEY)]
        stub = membership_pb2_grpc.MembershipServiceStub(served.channel)
        info = served.twin.workers["d0"].info()
        answer = await stub.RegisterWorker(membership_pb2.RegisterWorkerRequest(worker=info))
        assert answer.controller_id == "controller-under-test"


async def test_a_malformed_registration_is_refused() -> None:
    async with api() as served:
        stub = membership_pb2_grpc.MembershipServiceStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RegisterWorker(membership_pb2.RegisterWorkerRequest())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_deadline_of_the_call_ends_the_request_in_the_workers() -> None:
    async with api() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in served.generate(served.message(4000), timeout_s=0.3):
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await served.twin.until(served.twin.idle, "idle")


@pytest.mark.parametrize("then", ["reads on", "goes"])
async def test_a_client_that_stops_reading_is_given_up_and_its_request_ends_in_the_workers(
    then: str, caplog: pytest.LogCaptureFixture
) -> None:
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with api(client_stall_s=0.3, channel_options=window) as served:
        asked = served.message(4000)
        asked.n, asked.request_id = 4, "x" * 128
        call = served.generate(asked, timeout_s=60.0)
        await call.read()
        await served.twin.until(lambda: any(worker.cancelled for worker in served.twin.workers.values()), "cancelled")
        await served.twin.until(served.twin.idle, "idle")
        if then == "reads on":
            with pytest.raises(grpc.aio.AioRpcError, match="took nothing of the answer") as caught:
                await read_to_end(call)
            assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.CANCELLED, "cancelled")
        call.cancel()
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == [
        "client_stalled"
    ]


async def test_a_cancelled_call_ends_the_request_and_cancel_ends_the_stream() -> None:
    async with api() as served:
        call = served.generate(served.message(4000))
        await call.read()
        call.cancel()
        await served.twin.until(served.twin.idle, "idle")
        asked = served.message(4000)
        asked.request_id = "mine"
        responses = aiter(served.generate(asked))
        await anext(responses)
        stub = inference_pb2_grpc.InferenceServiceStub(served.channel)
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="mine"))).found
        rest = [response async for response in responses]
        assert rest[-1].choices[0].finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert not (await stub.Cancel(inference_pb2.CancelRequest(request_id="mine"))).found
        await served.twin.until(served.twin.idle, "idle")


async def test_a_broken_stream_is_resumed_by_id_and_index() -> None:
    async with api() as served:
        asked = served.message(300)
        asked.request_id = "mine"
        call, first = served.generate(asked), list[inference_pb2.GenerateResponse]()
        async for response in call:
            first.append(response)
            if len(ids(first)) >= 10:
                break
        call.cancel()
        await asyncio.gather(call.wait_for_connection(), return_exceptions=True)
        asked.next_index.append(len(ids(first)))
        rest = await served.collect(asked)
        assert ids(first) + ids(rest) == tokens_of(PROMPT, 3, 0, 300)
        assert rest[-1].usage.completion_tokens == 300
        timeline = served.twin.desk.request("mine")
        assert timeline is not None
        assert len(timeline.attempts) == 1, "it was one request all along"
