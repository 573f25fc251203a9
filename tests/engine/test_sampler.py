"""The sampler against a plain one, and what users and migrations rely on."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import Sampling
from engine.sampler import BadLogits, Draw, Drawn, Sampler, logprob_rows
from tests.engine.sampling_reference import acceptable, changed_logits, reference_noise, sampling

CPU = torch.device("cpu")
EOS = (1,)


def _sampler(vocab: int) -> Sampler:
    return Sampler(vocab, EOS, CPU)


def _draw(asked: Sampling, tokens: list[int] | None = None, *, prompt: int = 1, choice: int = 0) -> Draw:
    return Draw(asked, choice, array("i", tokens if tokens is not None else [0]), prompt)


def _ids(drawn: list[Drawn]) -> list[int]:
    return [each.token_id for each in drawn]


def _logits(rng: np.random.Generator, shape: str, vocab: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    logits = {
        "normal": rng.normal(0, 3, vocab),
        "flat": rng.normal(0, 0.01, vocab),
        "ties": rng.integers(-2, 3, vocab) * 1.5,
        "equal": np.full(vocab, 2.0),
        "peaked": rng.normal(0, 2, vocab) + 12 * (rng.random(vocab) < 0.01),
        "holes": np.where(rng.random(vocab) < 0.7, -np.inf, rng.normal(0, 2, vocab)),
    }[shape]
    if not np.isfinite(logits).any():
        logits[0] = 0.0
    return logits.astype(np.float32)


VOCABS = st.sampled_from([1, 2, 5, 40, 257, 300, 2500])
SHAPES = st.sampled_from(["normal", "flat", "ties", "equal", "peaked", "holes"])
SAMPLINGS = st.builds(
    sampling,
    st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7, 50.0]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    top_k=st.sampled_from([-1, 0, 0, 1, 2, 50, 256, 1000, 2300, 10**6]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.9, 1.0]),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.0, 0.4, -2.0]),
    bias=st.dictionaries(st.integers(0, 6), st.sampled_from([-100.0, 100.0, 0.25]), max_size=3),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 0, 3, 9]),
    stop=st.sampled_from([(), (2,), (2, 10**6)]),
)


@settings(max_examples=400, deadline=None)
@given(
    VOCABS,
    st.lists(st.tuples(SHAPES, SAMPLINGS, st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=5),
    st.integers(0, 2**32),
)
def test_every_row_draws_what_a_plain_sampler_draws(
    vocab: int, asks: list[tuple[str, Sampling, int, int]], entropy: int
) -> None:
    rng = np.random.default_rng(entropy)
    rows, draws, expected = [], [], []
    for shape, asked, choice, output in asks:
        row = _logits(rng, shape, vocab)
        tokens = array("i", rng.integers(0, min(vocab, 8), 4 + output).tolist())
        changed = changed_logits(row, asked, tokens, 4, EOS)
        if np.isfinite(changed).any():
            rows.append(row)
            draws.append(Draw(asked, choice, tokens, 4))
            expected.append(acceptable(changed, asked, reference_noise(asked.seed, choice, output, vocab)))
    if draws:
        drawn = _ids(_sampler(vocab).draw(torch.from_numpy(np.stack(rows)), draws))
        assert all(token_id in allowed for token_id, allowed in zip(drawn, expected, strict=True)), (drawn, expected)


@pytest.mark.parametrize("shape", ["normal", "flat", "ties", "equal", "peaked", "holes"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_a_large_vocabulary_draws_what_a_plain_sampler_draws(shape: str, top_p: float) -> None:
    rng = np.random.default_rng(5)
    rows = [_logits(rng, shape, 32_003) for _ in range(12)]
    asks = [sampling(1.0 + row / 8, top_p=top_p, min_p=1e-4 * (row % 2), seed=row) for row in range(12)]
    drawn = _ids(_sampler(32_003).draw(torch.from_numpy(np.stack(rows)), [_draw(asked) for asked in asks]))
    for row, asked, token_id in zip(rows, asks, drawn, strict=True):
        assert token_id in acceptable(row, asked, reference_noise(asked.seed, 0, 0, 32_003))


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 256, 4096])
def test_greedy_finds_the_best_wherever_it_lies(vocab: int) -> None:
    places = sorted(
        {0, 1, vocab // 2, max(0, vocab - 130), max(0, vocab - 129), max(0, vocab - 2), vocab - 1} & set(range(vocab))
    )
    logits = torch.zeros(len(places), vocab)
    for row, place in enumerate(places):
        logits[row, place:] = 1.0  # the lowest of many equal ones
    assert _ids(_sampler(vocab).draw(logits, [_draw(sampling(0.0))] * len(places))) == places


def test_greedy_draws_the_lowest_id_of_equal_ones() -> None:
    logits = torch.zeros(2, 500)
    logits[1, 300:] = 1
    greedy = _draw(sampling(0.0))
    penalized = _draw(sampling(0.0, bias={300: -1.0}))
    assert _ids(_sampler(500).draw(logits, [greedy, greedy])) == [0, 300]
    assert _ids(_sampler(500).draw(logits, [penalized, penalized])) == [0, 301]


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}])
def test_the_tightest_truncation_is_greedy(only: dict[str, float]) -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1))
    tight = msgspec.structs.replace(sampling(1.5), **only)
    drawn = _ids(_sampler(3000).draw(logits, [_draw(tight, choice=choice) for choice in range(8)]))
    assert drawn == logits.argmax(1).tolist()


def test_the_caller_s_logits_and_tokens_stay_as_they_are() -> None:
    logits = torch.randn(3, 400)
    before = logits.clone()
    asked = sampling(0.8, top_p=0.9, repetition=1.2, presence=1.0, bias={3: 100.0}, min_tokens=4, logprobs=2)
    draw = _draw(asked, [5, 6, 7], prompt=1)
    _sampler(400).draw(logits, [draw, draw, _draw(sampling(0.0))])
    assert torch.equal(logits, before)
    draw.tokens.append(8)  # fails while something still holds the buffer
    assert draw.tokens.tolist() == [5, 6, 7, 8]


def _mixed_batch(vocab: int) -> tuple[torch.Tensor, list[Draw]]:
    logits = torch.randn(12, vocab, generator=torch.Generator().manual_seed(2)) * 2
    asks = [
        sampling(0.0),
        sampling(1.0, seed=11),
        sampling(1.0, top_p=0.9, seed=12),
        sampling(0.7, top_k=40, top_p=0.95, seed=13),
        sampling(1.3, min_p=0.02, repetition=1.1, seed=14),
        sampling(0.0, presence=0.5, frequency=0.3),
    ]
    return logits, [_draw(asks[row % 6], [1, 2, 3, 3, row], prompt=2, choice=row // 6) for row in range(12)]


def test_a_resumed_sequence_draws_the_same_in_any_batch() -> None:
    logits, draws = _mixed_batch(5000)
    sampler = _sampler(5000)
    together = _ids(sampler.draw(logits, draws))
    alone = [_ids(_sampler(5000).draw(logits[row : row + 1], [draws[row]]))[0] for row in range(12)]
    order = [7, 3, 11, 0, 5, 9, 1, 8, 2, 10, 4, 6]
    shuffled = _ids(sampler.draw(logits[order], [draws[row] for row in order]))
    assert together == alone
    assert shuffled == [together[row] for row in order]


def test_where_the_prompt_ends_counts_but_not_what_it_says() -> None:
    logits = torch.zeros(1, 4000)
    sampler = _sampler(4000)
    asked = sampling(1.0)
    first = _ids(sampler.draw(logits, [_draw(asked, [5, 6, 7, 8], prompt=2)]))
    other_prompt = _ids(sampler.draw(logits, [_draw(asked, [9, 7, 9, 7, 8], prompt=3)]))
    later = _ids(sampler.draw(logits, [_draw(asked, [5, 6, 7, 8, 9], prompt=2)]))
    assert first == other_prompt != later


def test_choices_seeds_and_positions_draw_differently() -> None:
    sampler = _sampler(4000)
    draws = [_draw(sampling(1.0), choice=choice) for choice in range(50)]
    draws += [_draw(sampling(1.0, seed=1000 + seed)) for seed in range(50)]
    draws += [_draw(sampling(1.0), [0] * (2 + index)) for index in range(50)]
    assert len(set(_ids(sampler.draw(torch.zeros(150, 4000), draws)))) > 140


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (sampling(1.0), 8),
        (sampling(0.5), 8),
        (sampling(2.0, top_k=4), 4),
        (sampling(1.0, top_p=0.7), 3),
        (sampling(1.0, min_p=0.2), 4),
    ],
)
def test_frequencies_follow_the_distribution(asked: Sampling, allowed: int) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    weights = torch.exp(logits.double() / asked.temperature)
    weights[allowed:] = 0
    count = 20_000
    sampler = _sampler(8)
    draws = [_draw(asked, [0] * (1 + index), choice=choice) for index in range(200) for choice in range(count // 200)]
    counts = Counter(_ids(sampler.draw(logits.expand(count, 8).contiguous(), draws)))
    expected = (weights / weights.sum() * count).tolist()
    assert set(counts) == set(range(allowed))
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in range(allowed))
    assert chi_square < 29.9  # 7 degrees of freedom: passed by all but 1 in 10,000 true samples


def test_small_noise_on_the_logits_rarely_changes_a_draw() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2000, 1000, generator=generator) * 3
    draws = [_draw(sampling(1.0, top_p=0.95), [0] * (1 + row)) for row in range(2000)]
    clean = _ids(_sampler(1000).draw(logits, draws))
    noisy = _ids(_sampler(1000).draw(logits + 1e-3 * torch.randn(2000, 1000, generator=generator), draws))
    assert sum(a != b for a, b in zip(clean, noisy, strict=True)) <= 8


def test_end_and_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    asked = sampling(0.0, min_tokens=2, stop=(2,))
    drawn = [_ids(_sampler(4).draw(logits, [_draw(asked, [0] * (1 + out))]))[0] for out in range(3)]
    assert drawn == [3, 3, 1]


def test_penalties_are_openai_s_and_see_what_they_should() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.9, 4.0]])
    tokens = [0, 2, 2]  # prompt 0, output 2 2
    assert _ids(_sampler(4).draw(logits, [_draw(sampling(0.0, presence=2.0), tokens)])) == [0]
    assert _ids(_sampler(4).draw(logits, [_draw(sampling(0.0, repetition=2.0), tokens)])) == [3]
    bias = {2: 1.0}
    assert _ids(_sampler(4).draw(logits, [_draw(sampling(0.0, frequency=0.4, bias=bias), tokens)])) == [2]
    assert _ids(_sampler(4).draw(logits, [_draw(sampling(0.0, frequency=0.6, bias=bias), tokens)])) == [0]


def test_a_bias_of_100_forces_a_token_and_minus_100_bans_it() -> None:
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(4))
    forced = [_draw(sampling(1.0, bias={77: 100.0}), choice=choice) for choice in range(40)]
    assert set(_ids(_sampler(1000).draw(logits, forced))) == {77}
    logits[:, 77] = 12
    banned = [_draw(sampling(1.0, bias={77: -100.0}), choice=choice) for choice in range(40)]
    assert 77 not in _ids(_sampler(1000).draw(logits, banned))


def test_logprobs_are_those_of_the_raw_distribution_drawn_token_first() -> None:
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(5)) * 2
    asks = [
        sampling(0.0, logprobs=3),
        sampling(0.7, top_p=0.9, bias={9: 50.0}, repetition=1.5, logprobs=3),
        sampling(1.0, logprobs=0),
        sampling(1.0),
    ]
    drawn = _sampler(600).draw(logits, [_draw(asked) for asked in asks])
    truth = torch.log_softmax(logits, dim=1)
    for row, (each, top) in enumerate(zip(drawn, (3, 3, 0), strict=False)):
        assert each.logprobs is not None
        assert each.logprobs.token_ids == (each.token_id, *truth[row].topk(top).indices.tolist())
        assert each.logprobs.logprobs == tuple(truth[row, list(each.logprobs.token_ids)].tolist())
    assert drawn[1].token_id == 9
    assert drawn[3].logprobs is None


def test_prompt_logprobs_of_many_rows_and_of_more_tops_than_tokens() -> None:
    logits = torch.randn(700, 1000)
    ids = torch.randint(0, 1000, (700,))
    rows = logprob_rows(logits, ids, 2)
    truth = torch.log_softmax(logits, dim=1)
    assert [row.token_ids[0] for row in rows] == ids.tolist()
    assert [row.logprobs[0] for row in rows] == truth[torch.arange(700), ids].tolist()
    assert [row.token_ids[1] for row in rows] == logits.argmax(1).tolist()
    assert len(logprob_rows(logits[:1, :3], ids[:1] % 3, 20)[0].token_ids) == 4
    assert logprob_rows(logits[:0], ids[:0], 2) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nan_or_infinity_is_named(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 50)
    logits[2, 20] = bad
    with pytest.raises(BadLogits) as caught:
        _sampler(50).draw(logits, [_draw(sampling(temperature))] * 3)
    assert caught.value.row == 2
    with pytest.raises(BadLogits) as caught:
        logprob_rows(logits, torch.zeros(3, dtype=torch.int64), 1)
    assert caught.value.row == 2


def test_a_row_without_any_token_to_draw_is_named() -> None:
    logits = torch.zeros(3, 2)
    banned = _draw(sampling(1.0, min_tokens=2, stop=(0,)))
    with pytest.raises(BadLogits) as caught:
        _sampler(2).draw(logits, [_draw(sampling(0.0)), banned, banned])
    assert caught.value.row == 1
    logits[0] = -math.inf
    with pytest.raises(BadLogits) as caught:
        _sampler(2).draw(logits, [_draw(sampling(0.0))] * 3)
    assert caught.value.row == 0


def test_no_rows_draw_nothing() -> None:
    assert _sampler(10).draw(torch.empty(0, 10), []) == []


def test_the_noise_of_a_draw_depends_on_its_choice_and_not_on_its_prompt() -> None:
    draw = _draw(sampling(1.0))
    assert replace(draw, choice=1).key != draw.key
    assert replace(draw, tokens=array("i", [9])).key == draw.key
