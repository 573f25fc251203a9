"""A real cluster whose prefill worker was killed: the new one pulls the prompt from the decode worker, and the answer is the same."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import grpc
import httpx
import pytest

from pdserve.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.e2e.cluster import Cluster, kill, wait_until

pytestmark = pytest.mark.slow

PROMPT = array("i", [(13 * position) % 1000 + 20 for position in range(400)]).tobytes()
FULL_PAGES_TOKENS = 16 * (399 // 16)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Without a disk, a worker that is started anew holds nothing."""
    flags = ("--prefill", "1", "--decode", "1", "--set", "store.disk_bytes=0")
    cluster = Cluster(tmp_path_factory.mktemp("pulls") / "state", *flags)
    yield cluster
    cluster.stop()


def generate(cluster: Cluster) -> tuple[list[int], int]:
    """Token ids through both workers, and how many prompt tokens were not computed."""
    workers = cluster.workers().values()
    prefill = next(worker.worker_id for worker in workers if worker.roles == ("prefill",))
    decode = next(worker.worker_id for worker in workers if worker.roles == ("decode",))
    request = inference_pb2.GenerateRequest(
        token_ids=PROMPT,
        sampling=types_pb2.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        route=inference_pb2.RouteHint(prefill_worker=prefill, decode_worker=decode),
        skip_text=True,
    )
    with grpc.insecure_channel(str(cluster.status()["grpc_address"])) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        responses = list(stub.Generate(request, timeout=60))
    ids = [token for response in responses for choice in response.choices for token in choice.token_ids]
    return ids, responses[-1].usage.cached_tokens


def pulled_tokens(cluster: Cluster) -> float:
    text = httpx.get(f"{cluster.api_url}/metrics", timeout=30).text
    wanted = 'pdserve_kv_tier_loaded_tokens_total{tier="peer"}'
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted))


def test_a_prefill_worker_that_begins_anew_pulls_from_the_decode_worker(cluster: Cluster) -> None:
    computed, cached = generate(cluster)
    assert cached == 0
    (old,) = (worker.pid for worker in cluster.workers().values() if worker.roles == ("prefill",))
    kill(old)
    wait_until(lambda: old not in {each.pid for each in cluster.workers().values()}, "the worker was replaced")
    wait_until(lambda: cluster.ready(2), "both workers are ready")
    assert generate(cluster) == (computed, FULL_PAGES_TOKENS)
    wait_until(lambda: pulled_tokens(cluster) == FULL_PAGES_TOKENS, "the metrics tell of it")
