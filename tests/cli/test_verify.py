"""What `verify` sends, along which routes, and when it calls two answers equal."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from pdserve.cli.bench import Load, Measured, percentile, summary
from pdserve.cli.record import Record
from pdserve.cli.verify import plan
from pdserve.cli.verify_cases import MODES, cases
from pdserve.cli.verify_compare import compare
from pdserve.client import Choice, Generation, TokenLogprobs, Usage
from pdserve.errors import Unavailable


def worker(name: str, *roles: str, transports: tuple[str, ...] = ("ucx", "tcp"), state: str = "READY") -> object:
    return {"id": name, "roles": list(roles), "state": state, "kv_endpoints": [{"transport": t} for t in transports]}


def routes(*workers: object, transport: str = "", pairs: int = 2) -> list[str]:
    _, paths = plan(Record({"workers": list(workers)}), transport, pairs)
    return [path.name for path in paths]


def test_pairs_differ_in_both_workers_where_there_are_enough() -> None:
    square = [worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode"), worker("d1", "decode")]
    assert routes(*square) == [
        "p0 → d0 over ucx", "p1 → d1 over ucx", "p0 → d0 over tcp", "p1 → d1 over tcp",
    ]  # fmt: skip
    assert len(set(routes(*square, transport="tcp", pairs=9))) == 4


def test_every_transport_that_both_workers_offer_is_tried() -> None:
    offered = ("ucx", "nixl", "tcp", "inproc")
    assert routes(
        *(worker(name, role, transports=offered) for name, role in (("p0", "prefill"), ("d0", "decode")))
    ) == [f"p0 → d0 over {transport}" for transport in offered]


def test_workers_with_both_roles_are_compared_in_both_directions() -> None:
    both = [worker("b0", "prefill", "decode", transports=("tcp",)), worker("b1", "prefill", "decode")]
    assert routes(*both) == ["b0 → b1 over tcp", "b1 → b0 over tcp"]


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("p0", "prefill")],
        [worker("b0", "prefill", "decode")],
        [worker("p0", "prefill"), worker("d0", "decode", state="GONE")],
        [worker("p0", "prefill", transports=("ucx",)), worker("d0", "decode", transports=("tcp",))],
    ],
)
def test_a_cluster_without_a_pair_cannot_be_verified(workers: list[object]) -> None:
    with pytest.raises(Unavailable, match="pdserve"):
        routes(*workers)


def test_cases_cover_block_edges_both_ways_to_sample_and_one_and_three_choices() -> None:
    planned = cases([[1, 2, 3], [4, 5]], 1000, Random(1))
    assert {1, 15, 16, 17, 511, 513} <= {len(case.prompt) for case in planned}
    assert {(mode.n, mode.temperature > 0) for mode in MODES} == {(1, False), (3, False), (1, True), (3, True)}
    assert max(len(case.prompt) for case in planned) <= 1000
    assert planned == cases([[1, 2, 3], [4, 5]], 1000, Random(1))


CHOICE = Choice("ab", (7, 8), (TokenLogprobs((7,), (-0.5,)), TokenLogprobs((8, 9), (-1.0, -2.0))), "length", "")


def generation(*choices: Choice) -> Generation:
    return Generation("r", choices, Usage(1, 2, 0))


def judged(other: Choice) -> str:
    return compare(generation(CHOICE), generation(other), 1e-3).difference


def test_equal_generations_are_equal_and_the_largest_difference_is_told() -> None:
    near = replace(CHOICE, logprobs=(CHOICE.logprobs[0], TokenLogprobs((9, 8), (-2.0, -1.0002))))
    compared = compare(generation(CHOICE), generation(near), 1e-3)
    assert (compared.tokens, compared.difference) == (2, "")
    assert compared.logprob_error == pytest.approx(2e-4)


def test_every_kind_of_difference_is_named() -> None:
    assert judged(replace(CHOICE, token_ids=(7, 9))) == "choice 0: token 1 is 9 instead of 8"
    assert judged(replace(CHOICE, token_ids=(7,))) == "choice 0: token 1 is missing instead of 8"
    assert "other text" in judged(replace(CHOICE, text="ac"))
    assert "finished by stop" in judged(replace(CHOICE, finish_reason="stop"))
    assert "1 log-probabilities instead of 2" in judged(replace(CHOICE, logprobs=CHOICE.logprobs[:1]))
    assert "differs by 0.2" in judged(replace(CHOICE, logprobs=(TokenLogprobs((7,), (-0.7,)), CHOICE.logprobs[1])))
    assert "0 choices instead of 1" in compare(generation(CHOICE), generation(), 1e-3).difference


def test_percentiles_are_nearest_ranks() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]
    assert percentile([], 0.5) == 0.0


def test_the_summary_of_a_load_counts_what_was_answered() -> None:
    measured = Measured([0.1, 0.2], [0.01], [1.0, 2.0], tokens=20, errors=["overloaded: full"])
    told = summary(Load(2, 3, 16, 10), measured, wall_s=2.0)
    assert (told["requests"], told["errors"], told["requests_per_s"], told["tokens_per_s"]) == (2, 1, 1.0, 10.0)
