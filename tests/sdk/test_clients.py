"""Both clients against a scripted server: results, resumption, errors, deadlines, cancels."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pdserve import errors
from pdserve.client import AsyncClient, Client, Delta, Generation, KvBlend, RequestOptions, Route, Sampling
from pdserve.v1 import inference_pb2
from tests.sdk.scripted_server import Script, ScriptedServer, ServerMaker, expected

DEADLINE_S = 20.0

Generate = Callable[..., tuple[list[Delta], Generation]]


def _blocking(address: str, n: int = 1, timeout_s: float | None = None) -> tuple[list[Delta], Generation]:
    with Client(address, connect_s=1.0) as client:
        stream = client.generate("a prompt", Sampling(max_tokens=10), n=n, timeout_s=timeout_s)
        return list(stream), stream.result()


def _asynchronous(address: str, n: int = 1, timeout_s: float | None = None) -> tuple[list[Delta], Generation]:
    async def run() -> tuple[list[Delta], Generation]:
        async with AsyncClient(address, connect_s=1.0) as client:
            stream = client.generate("a prompt", Sampling(max_tokens=10), n=n, timeout_s=timeout_s)
            deltas = [delta async for delta in stream]
            return deltas, await stream.result()

    return asyncio.run(run())


both = pytest.mark.parametrize("generate", [_blocking, _asynchronous])


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@both
def test_a_stream_brings_deltas_and_a_result(serve: ServerMaker, generate: Generate) -> None:
    deltas, result = generate(serve().address, n=2)
    assert [choice.token_ids for choice in result.choices] == list(expected(2, 10))
    assert result.text == "".join(delta.text for delta in deltas if delta.choice == 0)
    assert [choice.finish_reason for choice in result.choices] == ["length", "length"]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 20)


@both
@pytest.mark.parametrize("short", [False, True])
def test_a_lost_stream_goes_on_without_a_token_lost_or_told_twice(
    serve: ServerMaker, generate: Generate, short: bool
) -> None:
    server = serve(Script(breaks=[3, 0, 7], short=short))
    deltas, result = generate(server.address, n=2)
    assert [choice.token_ids for choice in result.choices] == list(expected(2, 10))
    assert len(deltas) == 20
    assert [list(request.next_index) for request in server.requests] == [[], [2, 1], [2, 1], [5, 5]]
    assert len({request.request_id for request in server.requests}) == 1


@both
def test_a_typed_error_comes_back_typed_and_is_not_retried(serve: ServerMaker, generate: Generate) -> None:
    error = errors.Overloaded("queue is full, ünd später", param="n", retry_after_s=1.5)
    server = serve(Script(error=error))
    with pytest.raises(errors.Overloaded, match="ünd später") as raised:
        generate(server.address)
    assert (raised.value.param, raised.value.retry_after_s) == ("n", 1.5)
    assert len(server.requests) == 1


@both
def test_an_unavailable_that_the_server_chose_is_not_mistaken_for_a_lost_connection(
    serve: ServerMaker, generate: Generate
) -> None:
    server = serve(Script(error=errors.NoDecodeWorkers("none is left")))
    with pytest.raises(errors.NoDecodeWorkers):
        generate(server.address)
    assert len(server.requests) == 1


@both
def test_nobody_listening_is_unavailable_after_the_connect_deadline(serve: ServerMaker, generate: Generate) -> None:
    server = serve()
    server.stop()
    began_s = time.monotonic()
    with pytest.raises(errors.Unavailable):
        generate(server.address)
    assert 0.9 < time.monotonic() - began_s < DEADLINE_S


@both
def test_a_deadline_travels_and_ends_the_request(serve: ServerMaker, generate: Generate) -> None:
    server = serve(Script(hold=threading.Event()))
    with pytest.raises(errors.DeadlineExceeded):
        generate(server.address, timeout_s=2.0)
    assert server.remaining_s[0] is not None
    assert 0 < server.remaining_s[0] <= 2.0
    assert server.script.hold is not None
    server.script.hold.set()


@both
def test_a_deadline_bounds_the_resumption_too(serve: ServerMaker, generate: Generate) -> None:
    server = serve(Script(breaks=[0] * 1000))
    began_s = time.monotonic()
    with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)):
        generate(server.address, timeout_s=1.0)
    assert time.monotonic() - began_s < DEADLINE_S


def test_a_server_that_comes_back_at_its_port_is_found_again(serve: ServerMaker) -> None:
    hold = threading.Event()
    first = serve(Script(hold=hold))
    with Client(first.address) as client:
        stream = client.generate("a prompt")
        assert next(stream).token_ids == (0,)
        first.stop()
        hold.set()
        second = serve(Script(), first.port)
        assert stream.result().choices[0].token_ids == expected(1, 10)[0]
        assert list(second.requests[0].next_index) == [1]


def test_closing_a_stream_cancels_the_request(serve: ServerMaker) -> None:
    server = serve(Script(tokens=1000))
    with Client(server.address) as client:
        with client.generate("a prompt") as stream:
            next(stream)
        assert server.cancelled == [stream.request_id]
        stream = client.generate("a prompt")
        stream.result()
        stream.close()
    assert len(server.cancelled) == 1


async def test_cancelling_the_task_cancels_the_request(serve: ServerMaker) -> None:
    server = serve(Script(hold=threading.Event()))
    async with AsyncClient(server.address) as client:
        stream = client.generate("a prompt")
        task = asyncio.create_task(stream.result())
        await asyncio.to_thread(_wait_for, lambda: len(server.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert server.cancelled == [stream.request_id]
    assert server.script.hold is not None
    server.script.hold.set()


def test_cancel_says_whether_the_request_lived(serve: ServerMaker) -> None:
    server = serve()
    with Client(server.address) as client:
        stream = client.generate("a prompt")
        stream.result()
        assert client.cancel(stream.request_id)
        assert not client.cancel("unknown")


def test_a_key_that_rotates_is_asked_for_each_call(serve: ServerMaker) -> None:
    server = serve()
    keys = iter(["first", "second"])
    with Client(server.address, api_key=lambda: next(keys)) as client:
        client.generate("a").result()
        client.generate("b").result()
    assert server.keys == ["Bearer first", "Bearer second"]


def test_everything_that_was_asked_for_is_in_the_message(serve: ServerMaker) -> None:
    server = serve()
    sampling = Sampling(
        max_tokens=10, temperature=0.0, top_k=5, seed=7, logprobs=2, logit_bias={3: 1.5}, stop_token_ids=[9]
    )
    options = RequestOptions(
        "my-id", cache_salt="salt", priority=2, route=Route("p0", "d0", "tcp"), token_ids_only=True
    )
    with Client(server.address) as client:
        client.generate([1, 2, 70000], sampling, stop=["\n"], options=options).result()
    request = server.requests[0]
    assert request.token_ids == b"\x01\0\0\0\x02\0\0\0\x70\x11\x01\0"
    assert request.request_id == "my-id"
    assert (request.route.prefill_worker, request.route.decode_worker, request.route.transport) == ("p0", "d0", "tcp")
    assert request.sampling.temperature == 0.0
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert dict(request.sampling.logit_bias) == {3: 1.5}
    assert request.skip_text


@pytest.mark.parametrize(
    ("prompt", "sampling", "n"),
    [([2**31], Sampling(), 1), ("a", Sampling(seed=-1), 1), ("a", Sampling(), 0), ([1.5], Sampling(), 1)],
)
def test_what_no_message_can_hold_is_an_invalid_request(prompt: list[int], sampling: Sampling, n: int) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest):
        client.generate(prompt, sampling, n=n)


def test_a_blend_is_in_the_message_with_what_was_left_out_absent(serve: ServerMaker) -> None:
    server = serve()
    asked = [
        KvBlend(chunks=[(0, 20), (20, 40)], ratio=0.0),
        KvBlend(separator="###", method="epic", first_tokens=0),
        KvBlend(separator=[7, 8]),
        KvBlend(separator=[7], ratio="auto"),
    ]
    with Client(server.address) as client:
        for blend in asked:
            options = RequestOptions(kv_blend=blend)
            client.generate([1] * 50, Sampling(max_tokens=1), options=options).result()
    by_offset, by_text, by_ids, by_speeds = (request.kv_blend for request in server.requests)
    assert [(span.start, span.end) for span in by_offset.chunks] == [(0, 20), (20, 40)]
    assert (by_offset.HasField("ratio"), by_offset.ratio, by_offset.WhichOneof("separator")) == (True, 0.0, None)
    assert (by_text.separator_text, by_text.method) == ("###", inference_pb2.KvBlend.METHOD_EPIC)
    assert (by_text.HasField("first_tokens"), by_text.HasField("ratio")) == (True, False)
    assert by_ids.separator_ids == b"\x07\0\0\0\x08\0\0\0"
    assert [(one.auto_ratio, one.HasField("ratio")) for one in (by_offset, by_speeds)] == [(False, True), (True, False)]


@pytest.mark.parametrize("chunks", [[(-1, 5)], [(0, 2**40)], [(0.5, 20)]])
def test_offsets_that_no_message_can_hold_are_an_invalid_request(chunks: list[tuple[int, int]]) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest) as caught:
        client.generate([1] * 50, options=RequestOptions(kv_blend=KvBlend(chunks)))
    assert caught.value.param == "kv_blend"


def test_a_gap_in_the_tokens_is_an_error_not_a_shorter_answer(serve: ServerMaker) -> None:
    class Gap(ScriptedServer):
        def _response(self, request, choice, index):  # type: ignore[no-untyped-def]
            return super()._response(request, choice, index + 1)

    server = Gap(Script())
    try:
        with Client(server.address) as client, pytest.raises(errors.InternalError, match="never came"):
            client.generate("a prompt").result()
    finally:
        server.stop()


def test_a_message_larger_than_the_server_takes_is_named_so(serve: ServerMaker) -> None:
    server = serve()
    with Client(server.address) as client, pytest.raises(errors.RequestTooLarge):
        client.generate("x" * (5 * 2**20)).result()
