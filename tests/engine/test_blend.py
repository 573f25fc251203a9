"""The blend of chunks against whole prefills: of the engine itself, and of transformers in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.blend import BlendPass, BlendPrompt, BlendRun
from engine.blend_selection import Blend, Epic, Recipe
from engine.chunk_kv import PlacedChunk, ResidentChunk
from engine.scattered_attention import open_scattered
from pdserve.errors import DeadlineExceeded, InvalidRequest
from tests.engine.blend_rig import BlendRig, Kv, prompt_of
from tests.engine.rig import families, save_random

TOKENS = 900
SPANS = (
    (0, 130),
    (130, 300),
    (333, 560),
    (561, 562),
    (600, 880),
)  # the first is a prefix, two touch, one is a single token
FRESH = sorted(set(range(TOKENS)) - {position for start, end in SPANS for position in range(start, end)})
MODELS = ("llama", "qwen3", "qwen3-yarn", "mistral-window", "qwen2-window", "qwen3_moe")
KERNELS = ("auto", "torch")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, directory in found.items():
        save_random(families()[name], directory)
    return found


@pytest.fixture(params=KERNELS)
def rig(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Iterator[BlendRig]:
    opened = BlendRig.open(directories["llama"], str(request.param))
    yield opened
    opened.memory.close()


def assert_equal(got: Kv, wanted: Kv, tolerance: float = 1e-4, layers: slice = slice(None)) -> None:
    torch.testing.assert_close(got.key[layers], wanted.key[layers], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.value[layers], wanted.value[layers], atol=tolerance, rtol=tolerance)


def of_transformers(directory: Path, token_ids: list[int]) -> Kv:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.inference_mode():
        found = model(torch.tensor([token_ids]), use_cache=True)
    layers = found.past_key_values.layers
    key, value = (torch.stack([getattr(at, name)[0].transpose(0, 1) for at in layers]) for name in ("keys", "values"))
    return Kv(key, value, found.logits[0, -1])


# ---- all of it computed anew


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-yarn"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("recipe", [Blend(1.0), Epic(1000)])
def test_all_tokens_computed_anew_give_the_prefill_of_transformers(
    directories: dict[str, Path], name: str, kernels: str, recipe: Recipe
) -> None:
    rig, prompt = BlendRig.open(directories[name], kernels), prompt_of(TOKENS)
    got, _ = rig.blend(prompt, rig.placed(prompt, SPANS), recipe)
    wanted = of_transformers(directories[name], prompt)
    assert_equal(got, wanted)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("recipe", [Blend(1.0, filtering=0.0), Epic(1000), Blend(0.3)])
def test_with_the_kernels_what_is_computed_anew_has_the_bits_of_the_engine_s_own_prefill(
    directories: dict[str, Path], name: str, recipe: Recipe
) -> None:
    """With no chunk at all under any recipe; with chunks under those that compute all their tokens."""
    rig, prompt = BlendRig.open(directories[name]), prompt_of(TOKENS)
    assert rig.model.kernels is not None
    wanted = rig.full(prompt)
    chunks = rig.placed(prompt, SPANS if recipe != Blend(0.3) else ())
    got, _ = rig.blend(prompt, chunks, recipe)
    later = slice(None) if not isinstance(recipe, Epic) else slice(130, None)  # a chunk at 0 is taken as it is
    assert torch.equal(got.key[:, later], wanted.key[:, later])
    assert torch.equal(got.value, wanted.value)
    assert torch.equal(got.logits, wanted.logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [Blend(1.0), Epic(1000)])
@pytest.mark.parametrize("kernels", KERNELS)
def test_all_tokens_computed_anew_give_the_engine_s_prefill_for_windows_too(
    directories: dict[str, Path], name: str, recipe: Recipe, kernels: str
) -> None:
    rig, prompt = BlendRig.open(directories[name], kernels), prompt_of(TOKENS)
    wanted = rig.full(prompt)
    got, _ = rig.blend(prompt, rig.placed(prompt, SPANS), recipe)
    assert_equal(got, wanted)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-3, rtol=0)


def test_a_pool_of_bfloat16_is_met_within_its_rounding(directories: dict[str, Path]) -> None:
    rig, prompt = BlendRig.open(directories["llama"], kv_dtype="bfloat16"), prompt_of(TOKENS)
    wanted = rig.full(prompt)
    got, _ = rig.blend(prompt, rig.placed(prompt, SPANS), Blend(1.0))
    assert got.error(wanted) == 0
    got, _ = rig.blend(prompt, rig.placed(prompt, SPANS[:1]), Epic(0))
    assert 0 < got.error(wanted) < 0.01, "a chunk at 0 is exact but for the rounding of keys before their rotation"


# ---- nothing of the chunks computed anew


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "qwen3_moe"])
def test_a_ratio_of_0_is_exact_in_layers_0_and_1_and_pure_reuse_after(directories: dict[str, Path], name: str) -> None:
    rig, prompt = BlendRig.open(directories[name]), prompt_of(TOKENS)
    chunks = rig.placed(prompt, SPANS)
    exact, (got, blended) = rig.full(prompt), rig.blend(prompt, chunks, Blend(0.0))
    naive, _ = rig.blend(prompt, chunks, Epic(0))
    assert_equal(got, exact, layers=slice(0, 2))
    assert got.error(exact, slice(2, None)) > 0.05
    taken = torch.tensor([position for position in range(TOKENS) if position not in FRESH])
    assert torch.equal(got.key[2:, taken], naive.key[2:, taken])
    assert torch.equal(got.value[2:, taken], naive.value[2:, taken])
    assert [len(positions) for positions in blended.computed[:2]] == [TOKENS, TOKENS]
    assert blended.computed[2].tolist() == FRESH


def test_keys_of_a_chunk_are_those_of_its_place_in_the_prompt(rig: BlendRig) -> None:
    """In layer 0 nothing but the position depends on what comes before: there naive reuse is exact, anywhere."""
    prompt, chunk = prompt_of(1100, seed=1), prompt_of(60, seed=2)
    prompt[1000:1060] = chunk
    got, blended = rig.blend(prompt, [PlacedChunk(1000, rig.isolate(chunk))], Epic(0))
    assert set(blended.computed[0].tolist()).isdisjoint(range(1000, 1060))
    assert_equal(got, rig.full(prompt), 1e-5, slice(0, 1))


def test_a_chunk_at_the_start_is_exact_as_it_is(rig: BlendRig) -> None:
    prompt = prompt_of(300)
    exact, (got, blended) = rig.full(prompt), rig.blend(prompt, rig.placed(prompt, [(0, 200)]), Epic(50))
    assert blended.computed[0].tolist() == list(range(200, 300))
    assert_equal(got, exact, 1e-5)


# ---- which tokens, and what they see


@pytest.mark.parametrize("recipe", [Blend(0.0), Blend(0.1, filtering=0.0), Blend(0.2, filtering=1.0), Epic(0), Epic(9)])
def test_fresh_tokens_are_computed_in_every_layer_and_the_chunks_pay_their_share(rig: BlendRig, recipe: Recipe) -> None:
    prompt = prompt_of(TOKENS)
    _, blended = rig.blend(prompt, rig.placed(prompt, SPANS), recipe)
    for positions in blended.computed:
        assert set(FRESH) <= set(positions.tolist())
        assert positions.tolist() == sorted(positions.tolist())
    share = len(set(blended.computed[2].tolist()) - set(FRESH)) / (TOKENS - len(FRESH))
    wanted = (
        recipe.ratio if isinstance(recipe, Blend) else (1 + 3 * recipe.first_tokens) / 808 if recipe.first_tokens else 0
    )
    assert share == pytest.approx(wanted, abs=0.002)


def test_a_chunk_that_ends_the_prompt_leaves_its_last_token_to_be_computed(rig: BlendRig) -> None:
    prompt = prompt_of(200)
    for recipe in (Blend(0.0), Epic(0)):
        got, blended = rig.blend(prompt, rig.placed(prompt, [(50, 200)]), recipe)
        assert blended.computed[2].tolist() == [*range(50), 199]
        assert got.logits.isfinite().all()


@pytest.mark.parametrize("recipe", [Blend(0.3), Epic(20)])
def test_a_future_token_changes_no_earlier_row(rig: BlendRig, recipe: Recipe) -> None:
    """Under Epic any; under Blend one behind the chunks: one among them may change which tokens are worth computing."""
    prompt = prompt_of(TOKENS)
    chunks = rig.placed(prompt, SPANS)
    changed = 890 if isinstance(recipe, Blend) else 580
    before, _ = rig.blend(prompt, chunks, recipe)
    after, _ = rig.blend([*prompt[:changed], 400, *prompt[changed + 1 :]], chunks, recipe)
    assert torch.equal(before.key[:, :changed], after.key[:, :changed])
    assert torch.equal(before.value[:, :changed], after.value[:, :changed])
    assert not torch.equal(before.value[:, changed:], after.value[:, changed:])
    assert not torch.equal(before.logits, after.logits)


def test_what_is_in_the_pool_already_is_used_and_stays(rig: BlendRig) -> None:
    prompt, past = prompt_of(TOKENS), 120
    exact = rig.full(prompt)
    got, blended = rig.blend(prompt, rig.placed(prompt, SPANS[1:]), Blend(1.0), past)
    assert_equal(got, exact)
    assert blended.computed[0].tolist() == list(range(past, TOKENS))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [Blend(0.2), Epic(30)])
def test_the_kernels_and_torch_agree(directories: dict[str, Path], name: str, recipe: Recipe) -> None:
    prompt = prompt_of(TOKENS)
    found = []
    for kernels in KERNELS:
        rig = BlendRig.open(directories[name], kernels)
        found.append(rig.blend(prompt, rig.placed(prompt, SPANS), recipe))
    (one, first), (other, second) = found
    assert [a.tolist() for a in first.computed] == [b.tolist() for b in second.computed]
    assert_equal(one, other)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-3, rtol=0)


def test_threads_change_no_bit_and_the_chunks_stay_as_they_are(directories: dict[str, Path]) -> None:
    prompt, before, found = prompt_of(TOKENS), torch.get_num_threads(), list[Kv]()
    try:
        for threads in (1, 2):
            rig = BlendRig.open(directories["llama"], threads=threads)
            chunks = [rig.isolate(prompt[start:end]) for start, end in SPANS]
            kept = [(chunk.key.clone(), chunk.value.clone()) for chunk in chunks]
            placed = [PlacedChunk(start, chunk) for (start, _), chunk in zip(SPANS, chunks, strict=True)]
            found += [rig.blend(prompt, placed, Blend(0.2))[0] for _ in range(2)]
            for chunk, (key, value) in zip(chunks, kept, strict=True):
                assert torch.equal(chunk.key, key)
                assert torch.equal(chunk.value, value)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].key, other.key)
        assert torch.equal(found[0].logits, other.logits)


# ---- readers, and prompts that do not fit


@dataclass(slots=True)
class Reader:
    """A ChunkKv that remembers what it was asked for, and may fail in one layer."""

    inner: ResidentChunk
    fails: int = -1
    asked: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.inner.tokens

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(layer)
        if layer == self.fails:
            raise DeadlineExceeded("The chunk did not come in time.")
        return self.inner.layer(layer)


def test_layers_are_read_in_order_each_once_and_only_those_that_are_used(rig: BlendRig) -> None:
    prompt = prompt_of(300)
    for recipe, wanted in ((Blend(0.2), [1, 2]), (Blend(1.0, filtering=0.0), [1]), (Epic(5), [0, 1, 2])):
        reader = Reader(rig.isolate(prompt[100:200]))
        rig.blend(prompt, [PlacedChunk(100, reader)], recipe)
        assert reader.asked == wanted


def test_a_reader_that_fails_ends_the_blend_with_its_own_error(rig: BlendRig) -> None:
    prompt = prompt_of(300)
    with pytest.raises(DeadlineExceeded, match="in time"):
        rig.blend(prompt, [PlacedChunk(100, Reader(rig.isolate(prompt[100:200]), fails=2))], Blend(0.2))
    assert_equal(rig.blend(prompt, [], Blend(0.2))[0], rig.full(prompt))  # the blocks can be computed anew


def test_a_run_goes_layer_by_layer(rig: BlendRig) -> None:
    prompt = prompt_of(300)
    chunks = rig.placed(prompt, [(100, 200)])
    wanted, _ = rig.blend(prompt, chunks, Blend(0.2))
    attention = open_scattered(rig.memory.pool, rig.model.kernels, rig.model.spec.windows)
    given = BlendPrompt(prompt, rig.blocks(300), chunks)
    runs = [BlendRun(rig.model.decoder, attention, given, Blend(0.2)) for _ in range(2)]
    for _ in range(rig.model.spec.layers):
        for run in runs:
            run.advance()
    for run in runs:
        with torch.inference_mode():
            logits = rig.model.decoder.head(run.result().hidden)[0].double()
        assert torch.equal(logits, wanted.logits)


@pytest.mark.parametrize(("starts", "past"), [([250], 0), ([0, 99], 0), ([100, 0], 0), ([10], 11), ([], 300)], ids=str)
def test_chunks_that_do_not_fit_are_refused(rig: BlendRig, starts: list[int], past: int) -> None:
    prompt = prompt_of(300)
    chunk = rig.isolate(prompt[:100])
    given = BlendPrompt(prompt, rig.blocks(300), [PlacedChunk(start, chunk) for start in starts], past)
    attention = open_scattered(rig.memory.pool, rig.model.kernels, rig.model.spec.windows)
    with pytest.raises(InvalidRequest):
        BlendPass(rig.model.decoder, attention).run(given, Blend(0.2))
