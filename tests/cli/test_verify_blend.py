"""What `verify --blend` sends, how it measures, and when it says no."""

from __future__ import annotations

import math
from random import Random

import pytest

from pdserve.cli.blend_cases import built_in_cases, cases_of_lines
from pdserve.cli.blend_quality import Compared, Limits, Quality, kl_nats
from pdserve.client import TokenLogprobs
from pdserve.errors import InvalidRequest


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
