"""The race run whole gives what the race by rank gives, to the last tie."""

from __future__ import annotations

import torch

from engine.candidates import Truncation
from engine.noise import gumbel, rough_gumbel, stream_key, uniform_bits
from engine.race import Race
from tests.engine.sampling_reference import sampling

VOCAB = 300


def _race(logits: torch.Tensor, *, first_key: int = 0, top_k: int = 0) -> Race:
    keys = torch.tensor([stream_key(11, 0, first_key + row) for row in range(len(logits))]).unsqueeze(1)
    asked = [sampling(top_k=top_k)] * len(logits)
    return Race(logits, Truncation.of(logits.amax(1), asked, logits.shape[1]), keys)


def _by_rank(race: Race) -> torch.Tensor:
    decided, winners = race._run(depth=VOCAB)
    assert decided.all()
    return winners


def test_rows_that_run_whole_have_the_winners_of_the_race_by_rank() -> None:
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 0.1, 3.0, 40.0):
        race = _race(spread * torch.randn(200, VOCAB, generator=generator))
        assert race.truncation.is_off(VOCAB)
        assert torch.equal(race.winners(), _by_rank(race))


def test_tokens_whose_scores_differ_in_the_last_bits_are_told_apart_by_the_exact_ones() -> None:
    """Every token's logit cancels its noise, so that rounding alone decides, in each row."""
    noise = gumbel(uniform_bits(_race(torch.zeros(50, VOCAB)).keys, torch.arange(VOCAB)))
    winners = _race(-noise).winners()  # a race in float64 works on its logits in place: one race each
    assert torch.equal(winners, _by_rank(_race(-noise)))
    assert len(set(winners.tolist())) > 10


def test_of_tokens_with_one_score_the_lowest_id_wins() -> None:
    race = _race(torch.zeros(1, VOCAB))
    tied = Race(race.logits.expand(2, -1), _race(torch.zeros(2, VOCAB)).truncation, race.keys.expand(2, -1))
    (winner,) = race.winners().tolist()
    assert tied.winners().tolist() == [winner, winner]
    noise = gumbel(uniform_bits(race.keys, torch.arange(VOCAB)))
    level = torch.full((1, VOCAB), -100.0, dtype=torch.float64)
    rivals = [7, 40, 255]
    level[0, rivals] = (noise[0, rivals].amax() - noise[0, rivals]).round(decimals=3)
    assert _race(level.clone()).winners().tolist() == _by_rank(_race(level.clone())).tolist()


def test_one_truncated_row_changes_no_other_row() -> None:
    generator = torch.Generator().manual_seed(4)
    whole = _race(torch.randn(4, VOCAB, generator=generator))
    truncation = Truncation.of(whole.logits.amax(1), [*[sampling()] * 3, sampling(top_k=1)], VOCAB)
    assert not truncation.is_off(VOCAB)
    mixed = Race(whole.logits, truncation, whole.keys).winners()
    assert mixed[:3].tolist() == whole.winners()[:3].tolist()
    assert mixed[3] == whole.logits[3].argmax()


def test_the_rough_noise_is_nearer_to_the_exact_one_than_the_race_needs() -> None:
    edges = torch.tensor([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1])
    bits = torch.cat([edges, torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(5))])
    assert (rough_gumbel(bits) - gumbel(bits)).abs().max() < 1e-12
