"""What `verify --blend` sends, how it measures, and when it says no."""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from pdserve.cli.blend_cases import built_in_cases, cases_of_lines
from pdserve.cli.blend_delivery import DEADLINE_S, PAUSE_S, deliver
from pdserve.cli.blend_quality import Compared, Limits, Quality, kl_nats
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_FAILED, EXIT_OK
from pdserve.cli.terminal import Terminal
from pdserve.cli.verify_blend import Found, add_blend_options, conclude, verify_blend
from pdserve.client import TokenLogprobs
from pdserve.errors import InvalidRequest, PdserveError, Unavailable


def tokenize(text: str) -> list[int]:
    return [len(word) for word in text.split(" ")]


def row(*probabilities: float, first: int = 0) -> TokenLogprobs:
    ids = tuple(range(first, first + len(probabilities)))
    return TokenLogprobs(ids, tuple(math.log(one) for one in probabilities))


def test_built_in_prompts_have_notes_as_chunks_and_end_with_a_question() -> None:
    cases = built_in_cases(20, 1000, tokenize, Random(1))
    assert cases == built_in_cases(20, 1000, tokenize, Random(1))
    for case in cases:
        assert len(case.chunks) >= 2
        assert all(end - start >= 16 for start, end in case.chunks)
        assert all(end == start for (_, end), (start, _) in zip(case.chunks, case.chunks[1:], strict=False))
        assert case.chunks[-1][1] < len(case.token_ids) - 2


def test_built_in_prompts_keep_to_the_context_or_say_that_they_cannot() -> None:
    assert max(len(case.token_ids) for case in built_in_cases(20, 200, tokenize, Random(1))) <= 200
    with pytest.raises(InvalidRequest, match="--prompts"):
        built_in_cases(1, 60, tokenize, Random(1))


def test_prompts_of_a_file_are_read_and_a_bad_line_is_named() -> None:
    good = '{"token_ids": [1, 2, 3], "chunks": [[0, 1]], "answer": 7}'
    (case,) = cases_of_lines([good, "", " \n"], "mine.jsonl")
    assert (case.name, case.token_ids, case.chunks) == ("mine.jsonl:1", (1, 2, 3), ((0, 1),))
    for bad in ("{", "[]", "{}", '{"token_ids": [1.5], "chunks": []}', '{"token_ids": [1], "chunks": [[1, 2, 3]]}'):
        with pytest.raises(InvalidRequest, match=r"mine\.jsonl:2"):
            cases_of_lines([good, bad], "mine.jsonl")
    with pytest.raises(InvalidRequest, match="no prompt"):
        cases_of_lines([], "mine.jsonl")


def test_the_divergence_of_whole_distributions_is_exact() -> None:
    full, blended = row(0.5, 0.25, 0.25), row(0.25, 0.5, 0.25)
    assert kl_nats(full, full) == pytest.approx(0, abs=1e-12)
    assert kl_nats(full, blended) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))


def test_the_drawn_token_that_is_listed_twice_counts_once() -> None:
    full = row(0.6, 0.3)
    twice = TokenLogprobs((0, *full.token_ids), (full.logprobs[0], *full.logprobs))
    other = row(0.5, 0.4)
    assert kl_nats(twice, other) == pytest.approx(kl_nats(full, other))


def test_what_is_not_listed_counts_with_the_least_that_is_and_the_rest_as_one() -> None:
    full, blended = row(0.6, 0.2), row(0.5, 0.1, first=1)
    wanted = 0.6 * math.log(0.6 / 0.1) + 0.2 * math.log(0.2 / 0.5) + 0.2 * math.log(0.2 / 0.4)
    assert kl_nats(full, blended) == pytest.approx(wanted)
    assert kl_nats(row(0.9), row(0.9, first=5)) == pytest.approx(0, abs=1e-9)  # nothing shared: no more can be told


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(0.2, 1.0, 0.5), []),
        (Limits(0.1, 1.0, 0.5), ["mean KL 0.15 nats, allowed 0.1"]),
        (Limits(0.2, 0.2, 0.5), ["largest KL 0.3 nats, allowed 0.2"]),
        (Limits(0.1, 0.2, 0.9), ["mean KL", "largest KL", "top-1 agreement 50.0%, needed 90.0%"]),
    ],
)
def test_a_model_fails_by_what_is_beyond_its_limit(limits: Limits, words: list[str]) -> None:
    rows = [Compared("a", 100, 80, 0.0, True), Compared("b", 100, 80, 0.3, False)]
    failures = Quality.of(rows).failures(limits)
    assert len(failures) == len(words)
    assert all(part in failure for part, failure in zip(words, failures, strict=True))


def test_the_kl_is_finite_where_a_token_is_impossible() -> None:
    certain = TokenLogprobs((0, 1), (0.0, -math.inf))
    other = TokenLogprobs((0, 1), (-math.inf, 0.0))
    assert kl_nats(certain, certain) == pytest.approx(0, abs=1e-9)
    assert 100 < kl_nats(certain, other) < math.inf


def test_a_figure_that_is_no_number_is_within_no_limit() -> None:
    assert len(Quality(1, math.nan, math.nan, math.nan).failures(Limits(1.0, 1.0, 0.0))) == 3


def options_of(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_blend_options(parser)
    return parser.parse_args(flags)


def found(divergence: float, setting: str = "verified") -> Found:
    rows = (Compared("a", 100, 80, divergence, True),)
    return Found("m", setting, rows, Quality.of(rows), Quality.of(rows), Limits(0.05, 1.0, 0.95))


LOST = Unavailable("nobody answers")


@pytest.mark.parametrize(
    ("divergence", "error", "status"),
    [(0.0, None, EXIT_OK), (0.0, LOST, EXIT_FAILED), (0.5, None, EXIT_CHECK_FAILED), (0.5, LOST, EXIT_CHECK_FAILED)],
)
def test_the_result_is_told_before_the_verdict_goes_out_and_a_failed_check_stays_one(
    divergence: float, error: PdserveError | None, status: int
) -> None:
    out, err = io.StringIO(), io.StringIO()
    told: list[str] = []

    def hand_over() -> PdserveError | None:
        told.append(out.getvalue())
        return error

    assert conclude(found(divergence), options_of(), Terminal("json", out, err), hand_over) == status
    assert told == [out.getvalue()]
    assert json.loads(told[0])["passed"] == (divergence == 0.0)
    assert ("NOT DELIVERED (nobody answers)" in err.getvalue()) == (error is not None)


def test_people_read_the_result_and_that_it_was_not_delivered() -> None:
    out = io.StringIO()
    conclude(found(0.5, "on"), options_of(), Terminal("text", out), lambda: LOST)
    failed, still, undelivered = (
        out.getvalue().index(words) for words in ("FAILED: m must not", "It still is", "NOT DELIVERED")
    )
    assert failed < still < undelivered


@dataclass
class Controller:
    """Takes a verdict after so many errors; its clock is that of the tries."""

    errors: list[PdserveError]
    now_s: float = 100.0
    pauses: list[float] = field(default_factory=list)
    taken: int = 0

    def send(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.taken += 1

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds

    def offered(self) -> PdserveError | None:
        return deliver(self.send, self.pause, lambda: self.now_s)


def test_a_verdict_is_offered_again_until_it_is_taken() -> None:
    controller = Controller([LOST, LOST])
    assert controller.offered() is None
    assert (controller.taken, controller.pauses) == (1, [PAUSE_S, PAUSE_S])


def test_it_is_given_up_at_the_deadline_and_at_once_where_it_is_refused() -> None:
    controller = Controller([LOST] * 1000)
    assert controller.offered() is LOST
    assert sum(controller.pauses) <= DEADLINE_S < sum(controller.pauses) + 2 * PAUSE_S
    refused = InvalidRequest("trial: is not known")
    controller = Controller([refused])
    assert controller.offered() is refused
    assert controller.pauses == []


@pytest.mark.parametrize("flag", ["--mean-kl", "--max-kl", "--agreement"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_limit_that_is_not_finite_is_refused_before_anything_is_asked(flag: str, value: str, tmp_path: Path) -> None:
    options = options_of(f"{flag}={value}")
    options.url, options.grpc, options.state_dir = "", "", tmp_path
    with pytest.raises(InvalidRequest, match=f"{flag} must be a finite number, not {value}"):
        verify_blend(options, Terminal("text", io.StringIO()))
