"""Requests that ask for a blend of chunks: what is marked, what is refused, and what the usage says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from controller.http_api.blend_marks import message_spans, tokens_within
from controller.http_api.bodies import ChatMessage
from controller.kv_blend import Chunk, KvBlend, Recipe
from controller.request import GenerationRequest
from pdserve.errors import InvalidRequest
from tests.controller.http_api.server import CONTEXT_TOKENS, ApiServer, serve
from tokenization.tokenizer import ids_from_bytes

IDS = list(range(20, 120))
ONE_CHUNK = {"chunks": [[0, 20]]}
TEXTS = ["the quick brown fox jumps over the lazy dog again and again", "naïve café, 你好, 🙂 and so on and so forth"]


def _requested(api: ApiServer, path: str, body: Mapping[str, object]) -> GenerationRequest:
    with api.client() as client:
        answer = client.post(path, json={"max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    return api.generator.requests[-1]


def _chunks(api: ApiServer, body: Mapping[str, object]) -> list[tuple[int, int]]:
    blend = _requested(api, "/v1/completions", body).kv_blend
    return [(chunk.start, chunk.end) for chunk in blend.chunks] if blend is not None else []


def test_offsets_arrive_with_the_defaults(api: ApiServer) -> None:
    request = _requested(api, "/v1/completions", {"prompt": IDS, "kv_blend": {"chunks": [[0, 20], [30, 98]]}})
    assert request.kv_blend == KvBlend(Recipe("blend", 0.15, 32), (Chunk(0, 20), Chunk(30, 98)))
    body = {"prompt": IDS, "kv_blend": {**ONE_CHUNK, "method": "epic", "ratio": 1, "first_tokens": 0}}
    assert _requested(api, "/v1/completions", body).kv_blend == KvBlend(Recipe("epic", 1, 0), (Chunk(0, 20),))
    by_speeds: dict[str, object] = {**ONE_CHUNK, "ratio": "auto"}
    request = _requested(api, "/v1/completions", {"prompt": IDS, "kv_blend": by_speeds})
    assert request.kv_blend == KvBlend(Recipe(ratio="auto"), (Chunk(0, 20),))


def test_without_it_or_with_short_chunks_alone_a_request_is_exact(api: ApiServer) -> None:
    assert _requested(api, "/v1/completions", {"prompt": IDS}).kv_blend is None
    assert _requested(api, "/v1/completions", {"prompt": IDS, "kv_blend": None}).kv_blend is None
    assert _requested(api, "/v1/completions", {"prompt": IDS, "kv_blend": {"chunks": [[0, 15]]}}).kv_blend is None


def test_a_separator_of_token_ids_or_of_text_cuts_the_prompt(api: ApiServer) -> None:
    prompt = [*IDS[:20], 7, 8, *IDS[20:50], 7, 8, 9, 10]
    assert _chunks(api, {"prompt": prompt, "kv_blend": {"separator": [7, 8]}}) == [(0, 20), (22, 52)]
    text = "<|end|>".join([*TEXTS, "question"])
    separator = ids_from_bytes(api.tokenizer.encode("<|end|>", add_special_tokens=False))
    ids = ids_from_bytes(api.tokenizer.encode(text, add_special_tokens=True))
    places = [place for place, token in enumerate(ids) if [token] == separator]
    wanted = [(0, places[0]), (places[0] + 1, places[1])]
    assert _chunks(api, {"prompt": text, "kv_blend": {"separator": "<|end|>"}}) == wanted


def test_every_prompt_of_a_list_is_cut_by_the_separator(api: ApiServer) -> None:
    body = {"prompt": [[*IDS[:20], 7, 9], [*IDS[:30], 7, 9]], "kv_blend": {"separator": [7]}, "max_tokens": 1}
    with api.client() as client:
        usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["blended_tokens"] == 20 + 30


def test_messages_of_a_chat_are_chunks_except_the_last_one(api: ApiServer) -> None:
    messages = [{"role": "user", "content": text} for text in [*TEXTS, "and now?"]]
    request = _requested(api, "/v1/chat/completions", {"messages": messages, "kv_blend": {"chunks": "messages"}})
    ids = ids_from_bytes(request.token_ids)
    assert request.kv_blend is not None
    spoken = [api.tokenizer.decode(ids[chunk.start : chunk.end]) for chunk in request.kv_blend.chunks]
    assert spoken == TEXTS


def test_a_message_that_the_template_changed_is_named() -> None:
    messages = [ChatMessage(role="user", content=text) for text in ("abc", "def")]
    assert message_spans("<abc><def>", messages) == [(1, 4), (6, 9)]
    with pytest.raises(InvalidRequest) as caught:
        message_spans("<abc><DEF>", messages)
    assert caught.value.param == "messages[1].content"


def test_tokens_that_only_touch_a_span_belong_to_no_chunk() -> None:
    offsets = [(0, 0), (0, 2), (2, 4), (4, 6), (6, 9), (9, 9), (9, 12)]
    assert tokens_within(offsets, [(2, 7)]) == (Chunk(2, 4),)
    assert tokens_within(offsets, [(0, 4), (9, 12)]) == (Chunk(1, 3), Chunk(6, 7))
    assert tokens_within(offsets, [(3, 5)]) == ()


def test_the_usage_tells_blended_tokens_in_answers_and_streams(client: httpx.Client) -> None:
    body = {"prompt": IDS, "kv_blend": ONE_CHUNK, "max_tokens": 1}
    details = {"cached_tokens": 3, "blended_tokens": 20}
    assert client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"] == details
    streamed = client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert '"prompt_tokens_details":{"cached_tokens":3,"blended_tokens":20}' in streamed.text


PROMPT: dict[str, object] = {"prompt": IDS, "max_tokens": 1}
CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**PROMPT, "kv_blend": {}}, "kv_blend"),
        ({**PROMPT, "kv_blend": True}, "kv_blend"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "separator": [7]}}, "kv_blend"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "mode": "blend"}}, "kv_blend.mode"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "method": "naive"}}, "kv_blend.method"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "ratio": 1.1}}, "kv_blend.ratio"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "ratio": "fast"}}, "kv_blend.ratio"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "ratio": True}}, "kv_blend.ratio"),
        ({**PROMPT, "kv_blend": {**ONE_CHUNK, "first_tokens": -1}}, "kv_blend.first_tokens"),
        ({**PROMPT, "kv_blend": {"chunks": []}}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"chunks": [[0, True]]}}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"chunks": [[0, 20, 30]]}}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"chunks": [[0, 2**31]]}}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"chunks": [[at, at + 1] for at in range(1025)]}}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"chunks": [[0, 20], [19, 40]]}}, "kv_blend.chunks[1]"),
        ({**PROMPT, "kv_blend": {"chunks": [[0, 99]]}}, "kv_blend.chunks[0]"),
        ({**PROMPT, "kv_blend": {"chunks": "messages"}}, "kv_blend.chunks"),
        ({**PROMPT, "prompt": [IDS, IDS], "kv_blend": ONE_CHUNK}, "kv_blend.chunks"),
        ({**PROMPT, "kv_blend": {"separator": ""}}, "kv_blend.separator"),
        ({**PROMPT, "kv_blend": {"separator": 7}}, "kv_blend.separator"),
        ({**PROMPT, "kv_blend": {"separator": [7]}}, "kv_blend.separator"),
        ({**PROMPT, "kv_blend": ONE_CHUNK, "echo": True, "logprobs": 1}, "kv_blend"),
        ({**CHAT, "kv_blend": {"separator": "nowhere"}}, "kv_blend.separator"),
        ({**CHAT, "kv_blend": {"chunks": [[0, 400]]}}, "kv_blend.chunks[0]"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_the_field(client: httpx.Client, body: dict[str, object], param: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_chat_beyond_the_context_is_refused_for_that(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "the 你 " * CONTEXT_TOKENS}, {"role": "user", "content": "?"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "kv_blend": {"chunks": "messages"}})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.fixture(scope="module")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serve(tmp_path_factory.mktemp("exact"), kv_blend="off") as server:
        yield server


@pytest.mark.parametrize("body", [{**PROMPT, "kv_blend": ONE_CHUNK}, {**CHAT, "kv_blend": {"chunks": "messages"}}])
def test_switched_off_it_is_a_400_that_names_the_setting_and_the_check(
    exact_server: ApiServer, body: dict[str, object]
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with exact_server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "kv_blend"
    assert "controller.kv_blend" in error["message"]
    assert "pdserve verify --blend" in error["message"]


FINDINGS: dict[str, object] = {
    "method": "blend", "ratio": 0.15, "first_tokens": 32, "blended_prompts": 30,
    "figures": {"mean_kl_nats": 0.001, "max_kl_nats": 0.01, "top1_agreement": 1.0},
    "allowed": {"mean_kl_nats": 0.05, "max_kl_nats": 1.0, "top1_agreement": 0.95}, "failures": [],
}  # fmt: skip
TRIALS, VERDICTS = "/api/v1/kv/blend/trials", "/api/v1/kv/blend/verdicts"


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[httpx.Client]:
    with serve(tmp_path, kv_blend="verified") as server, server.client() as client:
        yield client


def _asked(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/v1/completions", json={**PROMPT, "kv_blend": ONE_CHUNK, **fields})


def test_with_verified_a_verdict_opens_and_closes_the_gate_and_status_shows_it(gated: httpx.Client) -> None:
    refused = _asked(gated)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "kv_blend"
    for named in ("controller.kv_blend", "`verified`", "pdserve verify --blend"):
        assert named in refused.json()["error"]["message"]
    trial = gated.post(TRIALS).json()
    assert _asked(gated, cache_salt=trial["cache_salt"]).status_code == 200
    assert _asked(gated, cache_salt="mine").status_code == 400
    verdict = gated.post(VERDICTS, json={"trial": trial["cache_salt"], **FINDINGS})
    assert verdict.status_code == 200, verdict.text
    assert _asked(gated).status_code == 200
    assert _asked(gated, kv_blend={**ONE_CHUNK, "ratio": 0.1}).status_code == 400
    told = gated.get("/api/v1/status").json()["kv_blend"]
    assert (told["setting"], told["verdicts"]) == ("verified", [verdict.json()])
    assert told["model_identities"] == [trial["model_identity"]]
    trial = gated.post(TRIALS).json()
    failed = {**FINDINGS, "trial": trial["cache_salt"], "failures": ["mean KL 0.2 nats, allowed 0.05"]}
    assert gated.post(VERDICTS, json=failed).status_code == 200
    assert "mean KL 0.2 nats, allowed 0.05" in _asked(gated).json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [{"trial": "unknown"}, {"ratio": 2}, {"blended_prompts": 0}, {"figures": {}}, {"failures": "none"}, {"more": 1}],
)
def test_a_verdict_of_no_trial_or_with_wrong_fields_is_refused(gated: httpx.Client, change: dict[str, object]) -> None:
    trial = gated.post(TRIALS).json()["cache_salt"]
    assert gated.post(VERDICTS, json={"trial": trial, **FINDINGS, **change}).status_code == 400
    assert _asked(gated).status_code == 400


def test_where_it_is_switched_off_no_check_begins(exact_server: ApiServer) -> None:
    with exact_server.client() as client:
        answer = client.post(TRIALS)
    assert answer.status_code == 400
    assert "controller.kv_blend" in answer.json()["error"]["message"]
