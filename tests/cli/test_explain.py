"""`pdserve explain`: what is printed of a routing decision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from controller.placement.decision import Candidate, Decision, Pick
from controller.timeline import Timeline
from pdserve.cli.main import main
from tests.cli.test_kv import ApiTwin, Body

BEST = Candidate("split", "p1", "d0", "tcp", 0.25, {"load": 0.05, "prefill": 0.2}, "", "", 32, 400, 80, "p2")
OTHER = Candidate("split", "p0", "d0", "tcp", 0.6, {"load": 0.0, "prefill": 0.6}, "", "")
DECISION = Decision(1, 0.0, "least-loaded", "best", Pick("split", "p1", "d0", "tcp"), (BEST, OTHER), 0)
BLENDED = Decision(
    1, 0.0, "least-loaded", "best", Pick("split", "p1", "d0", "tcp"), (BEST, OTHER), 0, "chunks", recomputed_tokens=77
)


@pytest.fixture
def twin() -> Iterator[ApiTwin]:
    api = ApiTwin()
    yield api
    api.close()


def timeline_of(decision: Decision) -> Body:
    body: Body = asdict(Timeline("r1", 600, 1, 0.0, 0.0).view(1.0))
    return {**body, "decisions": [asdict(decision)]}


def printed(twin: ApiTwin, decision: Decision, capsys: pytest.CaptureFixture[str]) -> list[str]:
    twin.answers["/api/v1/requests/r1"] = [json.loads(json.dumps(timeline_of(decision)))]
    assert main(["explain", "r1", "--url", twin.url]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_row_per_candidate_tells_its_terms_and_what_it_holds_of_the_prompt(
    twin: ApiTwin, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(twin, DECISION, capsys)
    rows = [line.split("  ") for line in lines]
    found = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["CANDIDATE", "SCORE", "LOAD", "PREFILL", "ON DEVICE", "IN TIERS", "AT A PEER"] in found
    assert ["p1 → d0 over tcp", "0.25", "0.05", "0.2", "32", "400", "80 at p2"] in found
    assert ["p0 → d0 over tcp", "0.6", "0", "0.6", "0", "0", "0"] in found
    assert not any("chunks" in line for line in lines)


def test_of_a_blended_prompt_it_says_that_chunks_are_held_and_what_is_computed_anew(
    twin: ApiTwin, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(twin, BLENDED, capsys)
    assert any("of the prompt's chunks" in line and "work as for 77 of those is done anew" in line for line in lines)
