"""What bodies mean: the GenerationRequest that comes out of them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.request import GenerationRequest, SamplingSpec
from tests.controller.http_api.server import CONTEXT_TOKENS, ApiServer
from tokenization.tokenizer import ids_from_bytes

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _requested(api: ApiServer, path: str, body: Mapping[str, object]) -> GenerationRequest:
    api.generator.requests.clear()
    with api.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return api.generator.requests[0]


def test_defaults_are_those_of_openai(api: ApiServer) -> None:
    request = _requested(api, "/v1/completions", {"prompt": "hello"})
    assert request.sampling == SamplingSpec(max_tokens=16, seed=request.sampling.seed)
    assert (request.n, request.stop, request.cache_salt, request.priority) == (1, (), "", 0)
    assert api.tokenizer.decode(ids_from_bytes(request.token_ids)) == "hello"


def test_every_field_arrives(api: ApiServer) -> None:
    body: dict[str, object] = {
        "prompt": [5, 6, 7], "max_tokens": 7, "n": 2, "temperature": 0, "top_p": 0.5, "top_k": 9, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"7": -100, "5": 1.5},
        "seed": -1, "stop": ["zz"], "stop_token_ids": [3, 3, 4], "include_stop_str_in_output": True, "ignore_eos": True,
        "min_tokens": 2, "priority": -3, "cache_salt": "pepper", "logprobs": 2, "echo": True,
    }  # fmt: skip
    request = _requested(api, "/v1/completions", body)
    assert request.sampling == SamplingSpec(
        max_tokens=7, seed=2**64 - 1, temperature=0.0, top_p=0.5, top_k=9, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=-1.0, frequency_penalty=2.0, logit_bias=((5, 1.5), (7, -100.0)), min_tokens=2, ignore_eos=True,
        stop_token_ids=(3, 4), logprobs=2, prompt_logprobs=2,
    )  # fmt: skip
    assert (request.n, request.stop, request.include_stop_text) == (2, ("zz",), True)
    assert (request.cache_salt, request.priority, request.route) == ("pepper", -3, None)
    assert ids_from_bytes(request.token_ids) == [5, 6, 7]


def test_null_means_absent(api: ApiServer) -> None:
    names = [
        "model", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "min_tokens", "priority", "cache_salt", "logprobs", "echo",
        "stream", "stream_options", "return_token_ids", "suffix", "best_of", "user",
    ]  # fmt: skip
    request = _requested(api, "/v1/completions", {"prompt": "hello", **dict.fromkeys(names)})
    assert request.sampling == SamplingSpec(max_tokens=16, seed=request.sampling.seed)


def test_seeds_are_minted_afresh_where_none_is_given(api: ApiServer) -> None:
    seeds = {_requested(api, "/v1/completions", {"prompt": "x"}).sampling.seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_chat_may_use_the_rest_of_the_context(api: ApiServer) -> None:
    request = _requested(api, "/v1/chat/completions", CHAT)
    assert request.sampling.max_tokens == CONTEXT_TOKENS - request.prompt_tokens
    both = {**CHAT, "max_tokens": 5, "max_completion_tokens": 6}
    assert _requested(api, "/v1/chat/completions", both).sampling.max_tokens == 6


def test_the_default_of_completions_gives_way_to_the_context(api: ApiServer) -> None:
    request = _requested(api, "/v1/completions", {"prompt": [5] * (CONTEXT_TOKENS - 3)})
    assert request.sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("content", "rendered"),
    [("hi", "hi"), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"), ([], ""), ("", "")],
)
def test_contents_are_text_or_text_parts(api: ApiServer, content: object, rendered: str) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    ids = ids_from_bytes(_requested(api, "/v1/chat/completions", body).token_ids)
    assert api.tokenizer.decode(ids, skip_special_tokens=False) == f"<|user|>{rendered}<|end|>>"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_all_roles_reach_the_template(api: ApiServer, role: str) -> None:
    body = {"messages": [{"role": role, "content": "x", "name": "n", "tool_call_id": "t"}], "max_tokens": 1}
    assert _requested(api, "/v1/chat/completions", body).prompt_tokens > 0


def test_harmless_and_neutral_fields_of_other_clients_are_accepted(api: ApiServer) -> None:
    body: dict[str, object] = {
        **CHAT, "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "reasoning_effort": "low", "functions": None,
        "skip_special_tokens": True, "best_of": 1, "modalities": ["text"], "made_up_by_a_client": {"x": [1]},
    }  # fmt: skip
    assert _requested(api, "/v1/chat/completions", body).sampling.temperature == 1.0


def test_several_prompts_become_several_requests_with_one_index_space(api: ApiServer, client: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": "both"}).json()
    assert [request.request_id for request in api.generator.requests] == ["both-0", "both-1"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 6, "blended_tokens": 0},
    }  # fmt: skip


def test_tokenize_and_detokenize_are_inverse(api: ApiServer, client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "naïve 🙂", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == CONTEXT_TOKENS
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "naïve 🙂"}
    chat = client.post("/tokenize", json=CHAT).json()
    assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": "<|user|>hello<|end|>>"}
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_operators_see_status_requests_and_decisions(client: httpx.Client) -> None:
    status = client.get("/api/v1/status").json()
    assert status["api_url"]
    assert {"id", "roles", "state", "pid", "engine_pid", "blocks_free"} <= status["workers"][0].keys()
    assert client.get("/api/v1/requests?limit=5").json()[0]["request_id"] == "r1"
    timeline = client.get("/api/v1/requests/r1").json()
    assert timeline["decisions"][0]["candidates"][0]["terms"] == {"queue": 0.5}


def test_operators_change_roles_and_drain(client: httpx.Client) -> None:
    changed = client.post("/api/v1/workers/p0/roles", json={"roles": ["decode", "prefill"]}).json()
    assert changed["roles"] == ["decode", "prefill"]
    assert client.post("/api/v1/workers/p0/drain").json()["state"] == "DRAINING"


def test_metrics_and_version_are_served(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert "vllm:num_requests_running" in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    assert client.get("/version").json() == {"version": "0.1.0"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    [
        "prompt",
        "messages",
        "model",
        "n",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "echo",
        "priority",
        "cache_salt",
        "tools",
        "response_format",
        "min_tokens",
        "presence_penalty",
        "return_token_ids",
        "add_special_tokens",
        "tokens",
        "kv_transfer_params",
        "suffix",
        "best_of",
    ]
)


@QUICK
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    fields=st.dictionaries(_FIELDS, _JSON, max_size=5),
    start=st.sampled_from([{}, {"prompt": "a"}, {"prompt": [1]}, CHAT, {"tokens": [1]}]),
)
def test_no_body_is_ever_a_server_error(
    client: httpx.Client, path: str, fields: dict[str, object], start: dict[str, object]
) -> None:
    answer = client.post(
        path, content=json.dumps({**start, **fields}).encode(), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@QUICK
@given(raw=st.binary(max_size=200))
def test_no_bytes_are_ever_a_server_error(client: httpx.Client, raw: bytes) -> None:
    answer = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
