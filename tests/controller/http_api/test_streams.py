"""The shape of streams, byte by byte, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from pdserve.errors import WorkerLost
from tests.controller.http_api.server import KEEPALIVE_S, ApiServer
from tests.controller.http_api.twins import OUTPUT

CHAT = {"messages": [{"role": "user", "content": "hello"}], "model": "tiny"}
DEADLINE_S = 10.0


def _events(text: str) -> list[dict[str, object]]:
    *events, done, empty = text.split("\n\n")
    assert done == "data: [DONE]"
    assert empty == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def _frame(head: str, choices: str, usage: str = "") -> str:
    return f"data: {head},{choices}{usage}}}\n\n"


def test_a_chat_stream_byte_by_byte(client: httpx.Client) -> None:
    body = {**CHAT, "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    created = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["created"]
    assert abs(created - time.time()) < 60
    head = f'{{"id":"chatcmpl-abc","object":"chat.completion.chunk","created":{created},"model":"tiny"'
    none = ',"logprobs":null,"finish_reason":null}]'
    null = ',"usage":null'
    assert answer.text == (
        _frame(head, '"choices":[{"index":0,"delta":{"role":"assistant","content":""}' + none, null)
        + _frame(head, '"choices":[{"index":0,"delta":{"content":"caf"}' + none, null)
        + _frame(head, '"choices":[{"index":0,"delta":{"content":"é"}' + none, null)
        + _frame(
            head, '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}]', null
        )
        + _frame(
            head,
            '"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10,'
            '"prompt_tokens_details":{"cached_tokens":3,"blended_tokens":0}}',
        )
        + "data: [DONE]\n\n"
    )


def test_a_completion_stream_byte_by_byte(client: httpx.Client) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 2}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": "abc"})
    created = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["created"]
    head = f'{{"id":"cmpl-abc","object":"text_completion","created":{created},"model":"tiny"'
    none = ',"logprobs":null,"finish_reason":null}]'
    assert answer.text == (
        _frame(head, '"choices":[{"index":0,"text":"caf"' + none)
        + _frame(head, '"choices":[{"index":0,"text":"é"' + none)
        + _frame(head, '"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}]')
        + "data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"n": 3, "return_token_ids": True},
        {"prompt": [[8, 9], [5, 6, 7]], "n": 2, "logprobs": 1, "echo": True, "return_token_ids": True},
        {"stop": ["fox"]},
        {"stop": "fox", "include_stop_str_in_output": True, "logprobs": 1},
        {"return_tokens_as_token_ids": True, "logprobs": 1},
    ],
)
def test_a_stream_folds_into_the_whole_completion(client: httpx.Client, extra: dict[str, object]) -> None:
    body = {"prompt": "hello 🙂", "max_tokens": 20, **extra}
    whole = client.post("/v1/completions", json=body).json()
    stream = client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    events = _events(stream.text)
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]  # type: ignore[attr-defined]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if "return_token_ids" in extra:
            assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
            assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        if "logprobs" in extra:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                folded = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
                assert folded == choice["logprobs"][name]


def test_text_offsets_point_into_the_text(client: httpx.Client) -> None:
    body = {"prompt": "hé 🜁 x", "echo": True, "logprobs": 1, "max_tokens": 12}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    offsets, text = choice["logprobs"]["text_offset"], choice["text"]
    assert text.startswith("hé 🜁 x")
    for token, start, end in zip(choice["logprobs"]["tokens"], offsets, [*offsets[1:], len(text)], strict=True):
        assert text[start:end] == token or "\ufffd" in token
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None


def test_a_chat_stream_folds_into_the_whole_chat(client: httpx.Client) -> None:
    body = {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "max_tokens": 9}
    whole = client.post("/v1/chat/completions", json=body).json()
    events = _events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]  # type: ignore[attr-defined]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
        folded = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert folded == choice["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in folded)


def test_continuous_usage_counts_in_every_chunk(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "x", "stream": True, "max_tokens": 3, "stream_options": options}
    events = _events(client.post("/v1/completions", json=body).text)
    counts = [event["usage"]["completion_tokens"] for event in events]  # type: ignore[index]
    assert counts == [1, 2, 3, 3, 3]


def test_silence_is_bridged_by_comments(api: ApiServer, client: httpx.Client) -> None:
    api.generator.script.hang_after = 0
    with client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_raw()) == b": keep-alive\n\n"
    _wait(lambda: api.generator.closed == [api.generator.requests[0].request_id])


def test_waiting_for_a_worker_promises_no_status(api: ApiServer, client: httpx.Client) -> None:
    api.generator.script.begin_after_s = 3 * KEEPALIVE_S
    api.generator.script.fail_first = WorkerLost("gone")
    assert client.post("/v1/completions", json={"prompt": "x", "stream": True}).status_code == 503
    api.generator.script.fail_first = None
    assert _events(client.post("/v1/completions", json={"prompt": "x", "stream": True}).text)


def _wait(condition: Callable[[], bool]) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < DEADLINE_S, "it did not happen"
        time.sleep(0.001)
    return time.monotonic() - begun


@pytest.mark.parametrize("hang_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_ends_the_generator_at_once(api: ApiServer, hang_after: int, stream: bool) -> None:
    api.generator.script.hang_after = hang_after
    payload = json.dumps({"prompt": ["x", "y"], "n": 2, "stream": stream}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(payload) + payload
    )
    with socket.create_connection(("127.0.0.1", api.port), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        _wait(lambda: len(api.generator.live) == 2)
        assert api.generator.closed == []
    assert _wait(lambda: len(api.generator.closed) == 2) < 5.0
    assert api.generator.live == set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_nothing_is_cut_and_its_request_ends(
    api: ApiServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """What it is sent is more than lies between the two; a stream's generator never ends by itself."""
    api.generator.script.hang_after = 220 if stream else None
    asked = {**CHAT, "n": 4, "max_tokens": 240, "logprobs": True, "top_logprobs": 20, "stream": stream}
    payload = json.dumps(asked).encode()
    with socket.socket() as connection:
        connection.settimeout(DEADLINE_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", api.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(payload) + payload
        )
        _wait(lambda: "client_stalled" in caplog.messages)
        _wait(lambda: len(api.generator.closed) == 1)
        assert api.generator.live == set()
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert not answer.endswith((b"0\r\n\r\n", b"}")), "nothing was kept back"


def test_two_live_requests_may_carry_one_id(api: ApiServer, client: httpx.Client) -> None:
    api.generator.script.hang_after = 1
    body, headers = {"prompt": "x", "stream": True}, {"x-request-id": "same"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as first:
        api.generator.script.hang_after = None
        second = client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert second.headers["x-request-id"] == first.headers["x-request-id"] == "same"
    assert len({request.request_id for request in api.generator.requests}) == 2


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a\tb", "ä"])
def test_a_request_id_that_is_not_clean_is_replaced(client: httpx.Client, bad: str) -> None:
    answer = client.get("/livez", headers={b"x-request-id": bad.encode()})
    assert len(answer.headers["x-request-id"]) == 32


async def test_many_streams_at_once_stay_apart(api: ApiServer) -> None:
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as client:

        async def one(tokens: int) -> None:
            body = {"prompt": f"p{tokens}", "stream": True, "max_tokens": tokens, "n": 2}
            answer = await client.post("/v1/completions", json=body)
            events = _events(answer.text)
            text = "".join(part["text"] for event in events for part in event["choices"] if part["index"] == 1)  # type: ignore[attr-defined]
            assert (OUTPUT * 20).startswith(text)
            assert len(text) >= tokens // 2

        await asyncio.gather(*(one(tokens) for tokens in range(1, 65)))
    assert api.generator.live == set()


def test_an_error_between_events_of_several_prompts_ends_them_all(api: ApiServer, client: httpx.Client) -> None:
    api.generator.script.fail_after = (2, WorkerLost("gone"))
    answer = client.post("/v1/completions", json={"prompt": ["x", "y"], "stream": True})
    assert answer.text.count('"error"') == 1
    assert "[DONE]" not in answer.text
    _wait(lambda: not api.generator.live)
