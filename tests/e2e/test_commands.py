"""The commands against a real cluster."""

from __future__ import annotations

import json
import subprocess

import httpx
import pytest

from tests.e2e.cluster import COMMAND_S, PDSERVE, Cluster, run_cli

pytestmark = pytest.mark.slow

WORKER_KEYS = {
    "id", "roles", "state", "pid", "engine_pid", "address", "blocks_total", "blocks_free", "running", "waiting",
}  # fmt: skip


def test_status_is_one_object_with_the_url_and_the_workers(pair_cluster: Cluster) -> None:
    status = pair_cluster.status()
    assert str(status["api_url"]).startswith("http://127.0.0.1:")
    workers = status["workers"]
    assert isinstance(workers, list)
    assert [worker["id"] for worker in workers] == ["d0", "p0"]
    assert all(worker.keys() >= WORKER_KEYS for worker in workers)


def test_a_second_up_says_that_a_cluster_runs_already(pair_cluster: Cluster) -> None:
    answer = run_cli(pair_cluster.state_dir, "up", "--detach", "--port", "0")
    assert answer.returncode == 0
    assert "runs already" in answer.stdout + answer.stderr
    assert pair_cluster.api_url in answer.stdout + answer.stderr


@pytest.mark.timeout(400)  # 250 requests, some of them long
def test_verify_finds_disaggregated_output_equal_over_every_transport(pair_cluster: Cluster) -> None:
    answer = run_cli(pair_cluster.state_dir, "verify", "-o", "json", "--max-tokens", "8", timeout_s=360)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert report["equal"]
    assert report["transports"] == ["tcp", "ucx"]
    assert len(report["routes"]) == 2 * 4  # greedy and seeded, one choice and three


def test_explain_tells_route_terms_and_timeline_of_a_request(pair_cluster: Cluster) -> None:
    body = {"prompt": "import os\n", "max_tokens": 4}
    headers = {"x-request-id": "explained"}
    httpx.post(f"{pair_cluster.api_url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    answer = run_cli(pair_cluster.state_dir, "explain", "explained")
    assert answer.returncode == 0
    assert "p0 → d0" in answer.stdout
    for word in ("least-loaded", "queue", "reserve", "prefill", "transfer", "decode"):
        assert word in answer.stdout
    unknown = run_cli(pair_cluster.state_dir, "explain", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr


def test_bench_reports_rates_and_latencies(pair_cluster: Cluster) -> None:
    answer = run_cli(pair_cluster.state_dir, "bench", "-o", "json", "--requests", "4", "--max-tokens", "4")
    report = json.loads(answer.stdout)
    assert (report["requests"], report["errors"]) == (4, 0)
    assert report["ttft_s_p50"] > 0


def test_chat_answers_a_line_of_standard_input(pair_cluster: Cluster) -> None:
    command = [PDSERVE, "chat", "--state-dir", str(pair_cluster.state_dir)]
    answer = subprocess.run(
        command, input="What is a list?\n", capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert answer.returncode == 0
    assert len(answer.stdout) > 10
