"""Every row of the error table of docs (interfaces), over a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from pdserve import errors
from service_kit.api_keys import ApiKeys
from tests.controller.http_api.server import CONTEXT_TOKENS, MAX_BODY_BYTES, ApiServer, serve

PROMPT = {"prompt": "hello", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, str]:
    """The envelope and nothing but the envelope."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    error: dict[str, str] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": 5}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": ["a", ""]}, "prompt[1]"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [True, False]}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt"),
        ("/v1/completions", {"prompt": [2**70]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 5}, "prompt"),
        ("/v1/completions", {**PROMPT, "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {**PROMPT, "max_tokens": "4"}, "max_tokens"),
        ("/v1/completions", {**PROMPT, "max_tokens": True}, "max_tokens"),
        ("/v1/completions", {**PROMPT, "n": 5}, "n"),
        ("/v1/completions", {**PROMPT, "n": 0}, "n"),
        ("/v1/completions", {**PROMPT, "temperature": -1}, "temperature"),
        ("/v1/completions", {**PROMPT, "top_p": 0}, "top_p"),
        ("/v1/completions", {**PROMPT, "min_p": 2}, "min_p"),
        ("/v1/completions", {**PROMPT, "top_k": -2}, "top_k"),
        ("/v1/completions", {**PROMPT, "logprobs": 21}, "logprobs"),
        ("/v1/completions", {**PROMPT, "seed": 2**63}, "seed"),
        ("/v1/completions", {**PROMPT, "stop": ["x"] * 17}, "stop"),
        ("/v1/completions", {**PROMPT, "stop": ""}, "stop"),
        ("/v1/completions", {**PROMPT, "stop": ["x" * 1025]}, "stop"),
        ("/v1/completions", {**PROMPT, "stop": [1]}, "stop"),
        ("/v1/completions", {**PROMPT, "stop_token_ids": [0] * 129}, "stop_token_ids"),
        ("/v1/completions", {**PROMPT, "stop_token_ids": [10**6]}, "stop_token_ids"),
        ("/v1/completions", {**PROMPT, "logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/completions", {**PROMPT, "logit_bias": {"1": 101}}, "logit_bias"),
        ("/v1/completions", {**PROMPT, "logit_bias": {"1000000": 1}}, "logit_bias"),
        ("/v1/completions", {**PROMPT, "logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias"),
        ("/v1/completions", {**PROMPT, "min_tokens": 5}, "min_tokens"),
        ("/v1/completions", {**PROMPT, "priority": 2**31}, "priority"),
        ("/v1/completions", {**PROMPT, "cache_salt": ""}, "cache_salt"),
        ("/v1/completions", {**PROMPT, "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {**PROMPT, "stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ("/v1/completions", {**PROMPT, "suffix": "x"}, "suffix"),
        ("/v1/completions", {**PROMPT, "best_of": 2}, "best_of"),
        ("/v1/completions", {**PROMPT, "kv_transfer_params": {}}, "kv_transfer_params"),
        ("/v1/completions", {**PROMPT, "structured_outputs": {"json": {}}}, "structured_outputs"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{}] * 5000}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/v1/chat/completions", {**CHAT, "kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("/tokenize", {}, None),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/api/v1/workers/p0/roles", {"roles": ["king"]}, "roles[0]"),
        ("/api/v1/workers/p0/roles", {"roles": []}, "roles"),
        ("/api/v1/workers/p0/roles", {"roles": ["decode"], "x": 1}, "x"),
    ],
)  # fmt: skip
def test_a_bad_field_is_a_400_that_names_it(
    client: httpx.Client, path: str, body: dict[str, object], param: str | None
) -> None:
    error = error_of(client.post(path, json=body), 400, "invalid_request_error")
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}', b"\x00" * 10, '{"prompt": "a"}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_a_400(client: httpx.Client, raw: bytes) -> None:
    error_of(client.post("/v1/completions", content=raw, headers=JSON), 400, "invalid_request_error")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
def test_another_content_type_is_a_400_that_says_which_to_send(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/completions", content=json.dumps(PROMPT), headers={"content-type": kind})
    assert "application/json" in error_of(answer, 400, "invalid_request_error")["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
def test_json_under_its_other_names_is_read(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/completions", content=json.dumps(PROMPT), headers={"content-type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "asked", "param"),
    [
        ("/v1/completions", {"prompt": [5] * 300}, 301, "prompt"),
        ("/v1/completions", {"prompt": [5] * CONTEXT_TOKENS}, CONTEXT_TOKENS + 1, "prompt"),
        ("/v1/completions", {"prompt": [5] * 200, "max_tokens": 100}, 300, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "xy" * 300}]}, None, "messages"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 256}, None, "max_completion_tokens"),
    ],
)
def test_a_prompt_too_long_is_a_400_with_both_numbers(
    client: httpx.Client, path: str, body: dict[str, object], asked: int | None, param: str
) -> None:
    error = error_of(client.post(path, json=body), 400, "context_length_exceeded")
    assert str(CONTEXT_TOKENS) in error["message"]
    assert asked is None or str(asked) in error["message"]
    assert error["param"] == param


def test_a_body_too_large_is_a_413_before_parsing(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", content=b"{" * (MAX_BODY_BYTES + 1), headers=JSON)
    assert str(MAX_BODY_BYTES) in error_of(answer, 413, "request_too_large")["message"]
    assert answer.headers["connection"] == "close"


def test_a_chunked_body_too_large_is_a_413_too(client: httpx.Client) -> None:
    chunks: Iterator[bytes] = iter([b"x" * 1000] * (MAX_BODY_BYTES // 1000 + 2))
    error_of(client.post("/v1/completions", content=chunks, headers=JSON), 413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_an_unknown_model_is_a_404(client: httpx.Client, path: str) -> None:
    body = {**PROMPT, **CHAT, "tokens": [1], "model": "gpt-7"}
    if path == "/tokenize":
        del body["messages"]
    error = error_of(client.post(path, json=body), 404, "model_not_found")
    assert error["param"] == "model"
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (errors.PermissionRefused("not yours"), 403, "permission_error"),
        (errors.Overloaded("full", retry_after_s=2.5), 429, "overloaded"),
        (errors.NoDecodeWorkers("none"), 503, "no_decode_workers"),
        (errors.NoPrefillWorkers("none"), 503, "no_prefill_workers"),
        (errors.WorkerLost("gone"), 503, "worker_lost"),
        (errors.DeadlineExceeded("late"), 504, "timeout"),
        (errors.LayoutMismatch("pages differ"), 500, "internal_error"),
        (errors.InternalError("secret cause"), 500, "internal_error"),
        (errors.RequestQuarantined("killed two workers"), 500, "request_quarantined"),
        (errors.Cancelled("by the operator"), 499, "cancelled"),
        (RuntimeError("secret cause"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_are_http_errors(
    api: ApiServer, client: httpx.Client, raised: Exception, status: int, code: str, stream: bool
) -> None:
    api.generator.script.fail_first = raised
    answer = client.post("/v1/completions", json={**PROMPT, "stream": stream}, headers={"x-request-id": "my-id"})
    error = error_of(answer, status, code)
    assert answer.headers["x-request-id"] == "my-id"
    if status in (429, 503):
        wanted_s = getattr(raised, "retry_after_s", None) or 1
        assert int(answer.headers["retry-after"]) >= wanted_s
        assert int(answer.headers["retry-after-ms"]) == wanted_s * 1000
    if code == "internal_error":
        assert "my-id" in error["message"]
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
    elif isinstance(raised, errors.PdserveError):
        assert error["message"] == raised.message


@pytest.mark.parametrize(
    ("raised", "code"), [(errors.WorkerLost("gone"), "worker_lost"), (RuntimeError("secret"), "internal_error")]
)
def test_an_error_after_the_first_byte_is_the_last_event_without_done(
    api: ApiServer, client: httpx.Client, raised: Exception, code: str
) -> None:
    api.generator.script.fail_after = (3, raised)
    answer = client.post("/v1/completions", json={**PROMPT, "stream": True})
    assert answer.status_code == 200
    *events, last, empty = answer.text.split("\n\n")
    assert len(events) == 3
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert empty == ""
    assert "secret" not in answer.text


def test_an_error_halfway_of_a_whole_answer_is_an_http_error(api: ApiServer, client: httpx.Client) -> None:
    api.generator.script.fail_after = (3, errors.WorkerLost("gone"))
    error_of(client.post("/v1/completions", json=PROMPT), 503, "worker_lost")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "embedding server"), ("/v1/responses", "/v1/chat/completions"), ("/nope", "/openapi.json"),
        ("/v1/audio/speech", "speech server"), ("/v1/completions/", "/openapi.json"),
    ],
)  # fmt: skip
def test_a_path_that_is_not_served_is_a_404_that_says_what_to_do(client: httpx.Client, path: str, words: str) -> None:
    assert words in error_of(client.post(path, json={}), 404, "not_found")["message"]


def test_a_wrong_method_is_a_405_that_names_the_right_one(client: httpx.Client) -> None:
    answer = client.get("/v1/completions")
    assert "POST" in error_of(answer, 405, "method_not_allowed")["message"]
    assert answer.headers["allow"] == "POST"


def test_a_bad_query_parameter_is_a_400(client: httpx.Client) -> None:
    assert error_of(client.get("/api/v1/requests?limit=x"), 400, "invalid_request_error")["param"] == "limit"


def test_unknown_workers_and_requests_are_404(client: httpx.Client) -> None:
    error_of(client.get("/api/v1/requests/never"), 404, "not_found")
    error_of(client.post("/api/v1/workers/zz/drain"), 404, "not_found")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serve(tmp_path_factory.mktemp("keyed"), ApiKeys((b"correct-horse",))) as server:
        yield server


@pytest.mark.parametrize("header", [None, "Bearer wrong-horse", "Basic correct-horse", "correct-horse", "Bearer"])
def test_without_a_valid_key_everything_but_health_is_a_401(keyed: ApiServer, header: str | None) -> None:
    with keyed.client() as client:
        client.headers.update({"authorization": header} if header else {})
        for path in ("/v1/models", "/api/v1/status", "/openapi.json", "/nope"):
            answer = client.get(path)
            error_of(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        error_of(client.post("/v1/completions", json=PROMPT), 401, "invalid_api_key")
        for path in ("/health", "/livez", "/readyz", "/version", "/metrics"):
            assert client.get(path).status_code == 200


def test_with_a_valid_key_requests_are_served(keyed: ApiServer) -> None:
    with keyed.client() as client:
        answer = client.post("/v1/completions", json=PROMPT, headers={"authorization": "Bearer correct-horse"})
        assert answer.status_code == 200


def test_readiness_is_503_without_a_ready_worker_but_the_process_lives(api: ApiServer, client: httpx.Client) -> None:
    api.operations.workers = ()
    for path in ("/readyz", "/health"):
        answer = client.get(path)
        error_of(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
    assert client.get("/livez").status_code == 200
