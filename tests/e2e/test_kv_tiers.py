"""Operators and the KV tiers of a real cluster: `pdserve kv` finds what was stored, and what was damaged since."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from pdserve.v1 import kv_pb2, kv_pb2_grpc
from tests.e2e.cluster import COMMAND_S, PDSERVE, Cluster, wait_until
from tests.kv_store.redis_server import running_redis

pytestmark = pytest.mark.slow

PROMPT = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n" * 6
TIERS = ("device", "host", "disk", "redis")
SAVED_S, LONGEST_S = 10.0, 120.0


@dataclass(frozen=True, slots=True)
class Operator:
    cluster: Cluster

    def kv(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [PDSERVE, "kv", arguments[0], "--state-dir", str(self.cluster.state_dir), *arguments[1:]]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )

    def told(self, *arguments: str) -> dict[str, object]:
        answer = self.kv(*arguments, "-o", "json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        report = json.loads(answer.stdout)
        assert isinstance(report, dict)
        return report

    def holding(self) -> dict[str, int]:
        """Tokens of PROMPT by tier, on the one worker."""
        body = {"prompt": PROMPT}
        answer = httpx.post(f"{self.cluster.api_url}/api/v1/kv/explain", json=body, timeout=30).json()
        (worker,) = answer["workers"]
        return {**worker["tokens"], "keyed": answer["keyed_tokens"], "reusable": worker["reusable_tokens"]}

    def compute(self) -> None:
        """From nothing: PROMPT then lies in every tier. A tier that is too busy is not waited for: then it is computed once more."""
        end_s = time.monotonic() + LONGEST_S
        while True:
            self._compute_once()
            try:
                return wait_until(self._everywhere, "the prompt lies in every tier", SAVED_S)
            except AssertionError:
                if time.monotonic() > end_s:
                    raise

    def _compute_once(self) -> None:
        httpx.post(f"{self.cluster.api_url}/api/v1/kv/flush", json={}, timeout=30).raise_for_status()
        body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
        httpx.post(f"{self.cluster.api_url}/v1/completions", json=body, timeout=60).raise_for_status()

    def _everywhere(self) -> bool:
        holding = self.holding()
        return all(holding[tier] == holding["keyed"] > 0 for tier in TIERS)

    def metrics(self) -> str:
        return httpx.get(f"{self.cluster.api_url}/metrics", timeout=30).text

    def on_disk(self) -> dict[str, str]:
        """Keys with those of their parents."""
        pages = self.told("ls", "--tier", "disk")["pages"]
        assert isinstance(pages, list)
        return {page["key"]: page["parent"] for page in pages}


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One worker with all tiers, Redis included."""
    folder = tmp_path_factory.mktemp("tiers")
    with running_redis(folder) as server:
        flags = ("--both", "1", "--set", f"store.redis_url={server.url}", "--set", "store.disk_bytes=268435456")
        cluster = Cluster(folder / "state", *flags)
        yield Operator(cluster)
        cluster.stop()


def damage(state_dir: Path, key: bytes) -> None:
    """Flips a bit of the page's record on disk, and of those that earlier copies left behind."""
    found = 0
    for segment in state_dir.rglob("segment-*"):
        content = bytearray(segment.read_bytes())
        at = -1
        while (at := content.find(key, at + 1)) >= 0:
            found += 1
            with segment.open("r+b") as file:
                file.seek(at + len(key) + 3)
                file.write(bytes([content[at + len(key) + 3] ^ 16]))
    assert found, "the page is not on disk"


def test_a_served_prompt_is_explained_by_tier_and_its_pages_are_listed(operator: Operator) -> None:
    operator.compute()
    holding = operator.holding()
    assert holding["reusable"] == holding["keyed"]
    text = operator.kv("explain", PROMPT).stdout
    assert [word for word in text.split() if word.isupper()] == [
        "WORKER",
        "DEVICE",
        "HOST",
        "DISK",
        "REDIS",
        "REUSABLE",
    ]
    pages = operator.told("ls", "--limit", "1000")["pages"]
    assert isinstance(pages, list)
    assert {page["tier"] for page in pages} == {"host", "disk", "redis"}
    assert len({page["key"] for page in pages}) == len(pages) // 3


def test_figures_of_every_tier_come_with_the_heartbeats(operator: Operator) -> None:
    operator.compute()
    on_disk = len(operator.on_disk())

    def reported() -> bool:
        (worker,) = httpx.get(f"{operator.cluster.api_url}/api/v1/kv", timeout=30).json()["workers"]
        tiers = {tier["tier"]: tier for tier in worker["tiers"]}
        return bool(tiers["disk"]["pages"] == on_disk and tiers["host"]["used_bytes"] and tiers["redis"]["used_bytes"])

    wait_until(reported, "the worker reports its tiers")
    text = operator.kv("stat").stdout
    assert all(f"  {tier}  " in text for tier in ("host", "disk", "redis"))


def test_pages_of_a_prompt_are_pinned_and_let_go(operator: Operator) -> None:
    operator.compute()
    pinned = operator.told("pin", "--prompt", PROMPT, "--for", "600")["pages"]
    pages = operator.told("ls", "--tier", "host", "--limit", "1000")["pages"]
    assert isinstance(pages, list)
    assert pinned == 2 * sum(page["held_s"] > 0 for page in pages) > 0  # on disk too
    operator.told("pin", "--prompt", PROMPT, "--for", "0")
    assert operator.kv("pin", "00" * 32).returncode == 1


def test_verify_finds_a_page_that_was_damaged_on_disk_and_ends_with_4(operator: Operator) -> None:
    operator.compute()
    assert operator.told("verify")["bad"] == 0
    parents = operator.on_disk()
    key = next(key for key in parents if key not in parents.values())  # no other record names it
    damage(operator.cluster.state_dir, bytes.fromhex(key))
    answer = operator.kv("verify", "--tier", "disk")
    assert answer.returncode == 4, answer.stdout + answer.stderr
    assert key in answer.stdout
    assert "1 bad" in answer.stdout
    wait_until(lambda: 'pdserve_kv_tier_verify_failures_total{kind="' in operator.metrics(), "a counter tells of it")
    assert operator.kv("verify", "--tier", "disk").returncode == 0
    assert key not in operator.on_disk()


def test_the_same_over_grpc(operator: Operator) -> None:
    operator.compute()
    with grpc.insecure_channel(str(operator.cluster.status()["grpc_address"])) as channel:
        stub = kv_pb2_grpc.KvServiceStub(channel)
        explained = stub.Explain(kv_pb2.KvExplainRequest(prompt=kv_pb2.KvPrompt(text=PROMPT)), timeout=30)
        assert explained.workers[0].tokens["disk"] == explained.keyed_tokens
        verified = stub.Verify(kv_pb2.KvVerifyRequest(), timeout=30)
        assert {each.outcome.tier for each in verified.outcomes} == {"host", "disk", "redis"}
        assert sum(each.outcome.bad for each in verified.outcomes) == 0


def test_a_flush_needs_yes_and_then_leaves_nothing(operator: Operator) -> None:
    operator.compute()
    refused = operator.kv("flush")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert operator.holding()["disk"]
    operator.told("flush", "--yes")
    wait_until(lambda: not any(operator.holding()[tier] for tier in TIERS), "nothing is left anywhere")
    assert operator.told("ls")["pages"] == []
