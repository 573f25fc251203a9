"""What a blend of chunks costs in exactness, on the shipped model and text that it wrote itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from engine.blend_selection import Blend, Epic, Recipe
from tests.engine.blend_rig import BlendRig
from tests.engine.rig import SHIPPED, generate, open_native, sampling, work

SPANS = ((40, 110), (110, 180), (180, 250))
TOKENS = 270


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    engine, recorder = open_native(SHIPPED)
    generate(engine, *(work(key, [0, 10 + key], sampling(TOKENS - 2, temperature=1.0, seed=key)) for key in range(4)))
    engine.close()
    return [[0, 10 + key, *recorder.tokens(key)[0]] for key in range(4)]


def errors(texts: Sequence[Sequence[int]], recipes: Sequence[Recipe]) -> list[float]:
    """Relative error of the KV, averaged over the texts."""
    rig, found = BlendRig.open(SHIPPED), [0.0] * len(recipes)
    for text in texts:
        exact, chunks = rig.full(text), rig.placed(text, SPANS)
        for place, recipe in enumerate(recipes):
            found[place] += rig.blend(text, chunks, recipe)[0].error(exact) / len(texts)
    return found


@pytest.mark.parametrize("filtering", [0.0, 0.5, 1.0])
def test_the_error_falls_as_the_ratio_grows(texts: list[list[int]], filtering: float) -> None:
    found = errors(texts, [Blend(ratio, filtering) for ratio in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)])
    assert all(more > less for more, less in pairwise(found)), found
    assert found[0] > 0.1
    assert found[-1] < 1e-4


def test_the_error_falls_as_more_first_tokens_are_computed(texts: list[list[int]]) -> None:
    found = errors(texts, [Epic(first_tokens) for first_tokens in (0, 7, 14, 28, 50, 70)])
    assert all(more > less for more, less in pairwise(found)), found
    assert found[-1] < 1e-4
