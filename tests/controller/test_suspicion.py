"""Who is to blame for the death of a worker: poison dies out after two, and takes no innocent prompt along."""

from __future__ import annotations

from random import Random

import pytest

from controller.suspicion import Present, blame

POISON = 0


def test_only_what_was_computed_is_suspected() -> None:
    waiting, computing = Present(1, False, 0), Present(2, True, 0)
    assert blame([waiting, computing]) == {2: "suspect"}


def test_where_nothing_was_computed_those_that_waited_are_suspected() -> None:
    assert blame([Present(1, False, 0), Present(2, False, 2)]) == {1: "suspect", 2: "poison"}
    assert blame([]) == {}


def test_a_prompt_that_waited_at_two_deaths_and_was_computed_at_none_is_not_refused_yet() -> None:
    assert blame([Present(1, False, 1)]) == {1: "suspect"}
    assert blame([Present(1, True, 1)]) == {1: "poison"}


def test_the_one_that_was_at_both_deaths_is_poison_and_the_others_stay_suspected() -> None:
    assert blame([Present(1, True, 0), Present(2, True, 1), Present(3, False, 1)]) == {1: "suspect", 2: "poison"}


def test_two_that_were_at_earlier_deaths_are_not_told_apart_yet() -> None:
    assert blame([Present(1, True, 1), Present(2, True, 1)]) == {1: "suspect", 2: "suspect"}


def test_a_request_whose_choices_are_apart_is_one_suspect() -> None:
    assert blame([Present(1, True, 1), Present(1, False, 1)]) == {1: "poison"}


@pytest.mark.parametrize("seed", range(200))
def test_a_prompt_that_kills_its_workers_kills_two_and_no_other_is_refused(seed: int) -> None:
    """Workers with a queue each compute some prompts at a time; those that were at a death are placed apart, as placement does."""
    rng = Random(seed)
    deaths = dict.fromkeys(range(rng.randrange(1, 20)), 0)
    left, killed, refused = set(deaths), 0, set()
    while left:
        queues: list[list[int]] = [[] for _ in range(rng.randrange(1, 4))]
        for prompt in rng.sample(sorted(left), len(left)):
            queue = rng.choice(queues)
            if not deaths[prompt] or not any(deaths[other] for other in queue):
                queue.append(prompt)
        for queue in queues:
            computing = queue[: rng.randrange(1, 5)]
            if POISON not in computing:
                left -= set(computing)
                continue
            killed += 1
            present = [Present(prompt, prompt in computing, deaths[prompt]) for prompt in queue]
            for prompt, verdict in blame(present).items():
                deaths[prompt] += 1
                if verdict == "poison":
                    refused.add(prompt)
                    left.discard(prompt)
    assert refused == {POISON}
    assert killed == 2
