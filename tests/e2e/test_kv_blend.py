"""Blended KV on a real cluster: deterministic, the same split or local, unharmed by the death of a worker, and gated."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from pdserve.cli.record import Record
from pdserve.client import Client, Generation, KvBlend, RequestOptions, Route, Sampling
from pdserve.errors import InvalidRequest
from tests.e2e.cluster import Cluster, kill, run_cli, wait_until
from tests.e2e.streams import Streamed, complete, events, fold

pytestmark = pytest.mark.slow

TOKENS = [(37 * at * at + 11 * at) % 1900 + 60 for at in range(420)]
CHUNKS = [[2, 130], [131, 260], [262, 400]]
BLENDED = sum(end - start for start, end in CHUNKS)
NEW_TOKENS = 200
# Naive reuse, drawn with a seed: a run that lost its chunks, or blended them otherwise, would not bring these tokens by chance.
BLEND: dict[str, object] = {"chunks": CHUNKS, "method": "epic", "first_tokens": 0}
BODY: dict[str, object] = {
    "prompt": TOKENS, "max_tokens": NEW_TOKENS, "temperature": 1, "seed": 5, "ignore_eos": True, "kv_blend": BLEND,
}  # fmt: skip
CHECK = ("verify", "--blend", "--count", "4")
LOOSE = ("--agreement", "0", "--mean-kl", "9", "--max-kl", "9")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and two decode workers; blends allowed, as the check has passed for both methods."""
    state_dir = tmp_path_factory.mktemp("blend") / "state"
    cluster = Cluster(state_dir, "--prefill", "1", "--decode", "2", "--set", "controller.kv_blend=verified")
    try:
        wait_until(lambda: cluster.ready(3), "three workers ready")
        for recipe in (("--ratio", "0.15"), ("--method", "epic", "--first-tokens", "0")):
            passed = run_cli(cluster.state_dir, *CHECK, *LOOSE, *recipe)
            assert passed.returncode == 0, passed.stdout + passed.stderr
        yield cluster
    finally:
        cluster.stop()


async def _stream(cluster: Cluster, body: dict[str, object]) -> Streamed:
    async with httpx.AsyncClient(base_url=cluster.api_url, timeout=60) as client:
        return await complete(client, body)


def _generate(client: Client, route: Route, method: str = "blend") -> Generation:
    blend = KvBlend([(start, end) for start, end in CHUNKS], method="blend" if method == "blend" else "epic")
    options = RequestOptions(route=route, kv_blend=blend)
    return client.generate(TOKENS, Sampling(40, 0.0, ignore_eos=True, logprobs=3), options=options).result()


@pytest.mark.parametrize("method", ["blend", "epic"])
def test_the_same_tokens_twice_split_or_local(cluster: Cluster, method: str) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    with Client(str(cluster.status()["grpc_address"])) as client:
        routes = [
            Route("p0", "d0", "tcp"),
            Route("p0", "d1", "ucx"),
            Route("p0", "d1", "tcp"),
            Route("", "d0"),
            Route("", "d0"),
        ]
        got = [_generate(client, route, method) for route in routes]
    assert {one.usage.blended_tokens for one in got} == {BLENDED}
    assert len({one.choices[0].token_ids for one in got}) == 1
    assert len({one.choices[0].logprobs for one in got}) == 1


async def test_a_blended_stream_survives_the_death_of_its_decode_worker(cluster: Cluster) -> None:
    body = {**BODY, "max_tokens": 1000}  # long enough that the worker is found and killed while it decodes
    undisturbed = await _stream(cluster, body)
    exact = await _stream(cluster, {**body, "kv_blend": None})
    assert undisturbed.token_ids != exact.token_ids
    streamed, killed, tag = Streamed(), False, f"blend-kill-{time.monotonic_ns()}"
    async with httpx.AsyncClient(base_url=cluster.api_url, timeout=60, headers={"x-request-id": tag}) as client:
        async for event in events(client, body):
            fold(streamed, event)
            if not killed and streamed.token_ids:
                killed = True
                decode_worker = _timeline(cluster, tag).record("summary").text("decode_worker")
                kill(cluster.workers()[decode_worker].engine_pid)
    assert streamed.error == ""
    assert streamed.token_ids == undisturbed.token_ids
    assert streamed.done
    timeline = _timeline(cluster, tag)
    assert timeline.integer("blended_tokens") == BLENDED
    attempts = timeline.records("attempts")
    assert len(attempts) > 1
    assert (attempts[-1].text("outcome"), attempts[-1].integer("blended_tokens")) == ("finished", BLENDED)


def _timeline(cluster: Cluster, request_id: str) -> Record:
    return Record.parse(httpx.get(f"{cluster.api_url}/api/v1/requests/{request_id}", timeout=10).text)


async def test_what_measured_speeds_chose_is_told_and_can_be_asked_for_again(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    tag = f"auto-{time.monotonic_ns()}"
    body = {**BODY, "max_tokens": 40, "kv_blend": {"chunks": CHUNKS, "ratio": "auto"}}
    headers = {"x-request-id": tag}
    async with httpx.AsyncClient(base_url=cluster.api_url, timeout=60, headers=headers) as client:
        by_speeds = await complete(client, body)
    timeline = _timeline(cluster, tag)
    choice = timeline.record("ratio_choice")
    explained = run_cli(cluster.state_dir, "explain", tag)
    assert explained.returncode == 0, explained.stdout + explained.stderr
    assert "by measured speeds: " in explained.stdout
    blend = {"chunks": CHUNKS, "ratio": choice.number("ratio")} if choice.has("ratio") else None
    assert timeline.integer("blended_tokens") == (BLENDED if choice.has("ratio") else 0)
    again = await _stream(cluster, {**body, "kv_blend": blend})
    assert again.token_ids == by_speeds.token_ids


def test_routing_knows_where_the_chunks_are_and_explain_says_so(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    body = {**BODY, "max_tokens": 1, "prompt": TOKENS[::-1], "kv_blend": {"chunks": CHUNKS}}
    asked: list[str] = []

    def held_at_prefill_worker() -> bool:
        asked.append(f"chunks-{time.monotonic_ns()}")
        httpx.post(f"{cluster.api_url}/v1/completions", json=body, headers={"x-request-id": asked[-1]}, timeout=60)
        decision = _timeline(cluster, asked[-1]).records("decisions")[0]
        held = {
            one.integer("device_tokens") + one.integer("stored_tokens")
            for one in decision.records("candidates")
            if one.text("prefill_worker") == "p0" and one.has("score")
        }
        return decision.text("reused") == "chunks" and held == {BLENDED}

    assert not held_at_prefill_worker()  # nobody had seen these chunks
    wait_until(held_at_prefill_worker, "the chunks are known to be where the first prompt was computed")
    explained = run_cli(cluster.state_dir, "explain", asked[-1])
    assert "of the prompt's chunks" in explained.stdout
    assert str(BLENDED) in explained.stdout


def test_messages_of_a_chat_are_found_again_in_another_order(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    notes = [f"Note {number}: " + " ".join(f"line {number * at}" for at in range(40)) for number in (3, 5)]
    answers = []
    for order in (notes, notes[::-1], notes):
        messages = [{"role": "user", "content": text} for text in (*order, "Which line comes next?")]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, "kv_blend": {"chunks": "messages"}}
        answer = httpx.post(f"{cluster.api_url}/v1/chat/completions", json=body, timeout=60).json()
        answers.append((answer["choices"], answer["usage"]["prompt_tokens_details"]["blended_tokens"]))
    assert answers[0] == answers[2]
    assert answers[0][1] == answers[1][1] > 2 * 40


def test_the_check_passes_with_loose_limits_and_tells_its_figures(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    loose = run_cli(cluster.state_dir, *CHECK, *LOOSE, "-o", "json")
    assert loose.returncode == 0, loose.stdout + loose.stderr
    told = json.loads(loose.stdout)
    assert told["passed"]
    assert told["blended_prompts"] == 4
    assert 0 < told["blended_tokens"] < told["prompt_tokens"]
    assert told["max_kl_nats"] >= told["mean_kl_nats"] > 0
    assert told["naive_reuse"]["mean_kl_nats"] > 0


def test_a_model_that_fails_the_check_is_refused_after_a_restart_too_until_it_passes(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ready(3), "three workers ready")
    body = {**BODY, "max_tokens": 1, "kv_blend": {"chunks": CHUNKS}}
    asked = partial(httpx.post, f"{cluster.api_url}/v1/completions", json=body, timeout=60)
    assert asked().status_code == 200
    strict = run_cli(cluster.state_dir, *CHECK, "--mean-kl", "0")
    assert strict.returncode == 4, strict.stdout + strict.stderr
    assert "pdserve-tiny must not be served with kv_blend: mean KL" in strict.stdout
    assert "blend failed (mean KL" in run_cli(cluster.state_dir, "status").stdout
    assert "mean KL" in asked().json()["error"]["message"]
    kill(int(str(cluster.status()["pid"])))
    wait_until(lambda: _answers(cluster) and cluster.ready(3), "the next controller has three workers")
    refused = asked()
    assert refused.status_code == 400
    assert "mean KL" in refused.json()["error"]["message"]
    loose = run_cli(cluster.state_dir, *CHECK, *LOOSE)
    assert loose.returncode == 0, loose.stdout + loose.stderr
    assert asked().status_code == 200


def _answers(cluster: Cluster) -> bool:
    try:
        return httpx.get(f"{cluster.api_url}/api/v1/status", timeout=5).is_success
    except httpx.HTTPError:
        return False


def test_where_it_is_switched_off_requests_and_the_check_are_refused(pair_cluster: Cluster) -> None:
    answer = httpx.post(f"{pair_cluster.api_url}/v1/completions", json=BODY, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_blend"
    with Client(str(pair_cluster.status()["grpc_address"])) as client, pytest.raises(InvalidRequest, match="--blend"):
        _generate(client, Route("", "d0"))
    check = run_cli(pair_cluster.state_dir, "verify", "--blend", "--count", "1")
    assert check.returncode == 2
    assert "controller.kv_blend" in check.stderr
