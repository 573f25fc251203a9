"""The noise of sampling: golden values, agreement with the plain formula, uniformity."""

from __future__ import annotations

import math

import pytest
import torch

from engine.noise import MAX_NOISE, MIN_NOISE, bits_for, gumbel, stream_key, uniform_bits
from tests.engine.sampling_reference import reference_noise

VOCAB = torch.arange(1000)


def _bits(seed: int, choice: int = 0, index: int = 0, vocab: torch.Tensor = VOCAB) -> torch.Tensor:
    return uniform_bits(torch.tensor([stream_key(seed, choice, index)]), vocab)


def test_bits_are_the_upper_halves_of_the_published_splitmix64_stream() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert uniform_bits(torch.tensor([1234567]), torch.arange(5)).tolist() == [word >> 32 for word in published]


def test_golden_values_stay() -> None:
    assert [stream_key(0, 0, 0), stream_key(2**64 - 1, 3, 70_000)] == KEYS
    assert _bits(42, 1, 5)[:4].tolist() == BITS
    assert [value.hex() for value in gumbel(_bits(42, 1, 5)[:4]).tolist()] == NOISE


def test_seeds_count_modulo_two_to_the_64() -> None:
    assert stream_key(-1, 0, 0) == stream_key(2**64 - 1, 0, 0)
    assert stream_key(2**64, 0, 0) == stream_key(0, 0, 0)


@pytest.mark.parametrize(("seed", "choice", "index"), [(0, 0, 0), (2**64 - 1, 0, 1), (12345, 7, 100_000)])
def test_noise_is_the_plain_formula(seed: int, choice: int, index: int) -> None:
    plain = torch.from_numpy(reference_noise(seed, choice, index, 1000))
    torch.testing.assert_close(gumbel(_bits(seed, choice, index)), plain, rtol=1e-13, atol=1e-13)


def test_noise_of_a_token_does_not_depend_on_the_others_it_is_computed_with() -> None:
    every = gumbel(_bits(9))
    alone = torch.cat([gumbel(_bits(9, vocab=torch.tensor([token_id]))) for token_id in range(1000)])
    strided = gumbel(_bits(9, vocab=torch.arange(2000)[::2]))
    assert torch.equal(every, alone)
    assert torch.equal(strided, gumbel(_bits(9, vocab=torch.arange(2000)))[::2])


def test_extreme_bits_give_the_bounds() -> None:
    lowest, highest = gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert math.isclose(highest, -math.log(-math.log1p(-(2.0**-33))), rel_tol=1e-12)
    assert MIN_NOISE < lowest < -3.12
    assert 22.87 < highest < MAX_NOISE


def test_more_bits_never_mean_less_noise() -> None:
    bits = torch.cat((torch.arange(2000), torch.arange(2**31, 2**31 + 2000), torch.arange(2**32 - 2000, 2**32)))
    assert (gumbel(bits).diff() >= 0).all()


def test_bits_below_the_needed_ones_give_less_noise() -> None:
    wanted = torch.linspace(-3.13, 22.87, 4001, dtype=torch.float64)
    needed = bits_for(wanted)
    below = (needed - 1).clamp(min=0)
    assert (gumbel(below)[needed > 0] < wanted[needed > 0]).all()
    assert (gumbel((needed + 4).clamp(max=2**32 - 1)) >= wanted - 1e-9).all()


def test_bits_are_uniform_over_tokens_positions_choices_and_seeds() -> None:
    tokens = _bits(1, vocab=torch.arange(64_000))
    positions = torch.cat([_bits(1, index=index, vocab=torch.tensor([17])) for index in range(8000)])
    choices = torch.cat([_bits(1, choice=choice, vocab=torch.tensor([17])) for choice in range(8000)])
    seeds = torch.cat([_bits(seed, vocab=torch.tensor([17])) for seed in range(8000)])
    for sample in (tokens, positions, choices, seeds):
        for shift in (28, 14, 0):  # the highest bits, some in the middle, the lowest
            counts = torch.bincount((sample >> shift) & 15, minlength=16).double()
            expected = len(sample) / 16
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert chi_square < 44.3  # 15 degrees of freedom: passed by all but 1 in 10,000 true samples


def test_neighbouring_keys_are_uncorrelated() -> None:
    rows = torch.stack([_bits(3, index=index) for index in range(40)] + [_bits(3, choice=c) for c in range(1, 40)])
    rows = torch.cat((rows, torch.stack([_bits(seed) for seed in range(4, 40)])))
    correlation = torch.corrcoef(rows.double())
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5.2 / math.sqrt(1000)


KEYS = [2558736989570252433, -4488945706597927196]
BITS = [1590475715, 204001920, 2926523776, 3229584899]
NOISE = ["0x1.b142a28988657p-8", "-0x1.1d3aed6cf7960p+0", "0x1.ea897ef0d27fep-1", "0x1.41445a0dde330p+0"]
