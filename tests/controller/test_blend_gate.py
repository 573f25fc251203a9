"""Who may ask for a blend: by the setting, by the last verdict on exactly this model, and while a check runs."""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from controller.blend_gate import TRIAL_IDLE_S, TRIALS_MOST, BlendGate
from controller.blend_verdicts import BlendFigures, BlendFindings, BlendVerdict, VerdictFile, VerdictShelf
from controller.kv_blend import Chunk, KvBlend, Recipe
from controller.request import GenerationRequest
from pdserve.errors import InternalError, InvalidRequest, Unavailable
from service_kit.config import BlendSetting
from tests.controller.blend_twins import IDENTITY, ShelfTwin
from tests.controller.cluster_twin import ClusterTwin, asked, cluster
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin

OTHER = bytes(32)
ALLOWED = BlendFigures(0.05, 1.0, 0.95)
PASSED = BlendFindings("blend", 0.15, 32, 30, BlendFigures(0.001, 0.01, 1.0), ALLOWED, ())
FAILED = replace(PASSED, figures=BlendFigures(0.2, 0.9, 0.9), failures=("mean KL 0.2 nats, allowed 0.05",))


@dataclass
class Bench:
    """A gate, the models that workers serve, and a clock."""

    setting: BlendSetting = "verified"
    shelf: VerdictShelf = field(default_factory=ShelfTwin)
    models: frozenset[bytes] = frozenset([IDENTITY])
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.gate = self.restarted()

    def restarted(self) -> BlendGate:
        return BlendGate(self.setting, self.shelf, lambda: self.models, lambda: self.now_s, lambda: 1_700_000_000.0)

    def verify(self, findings: BlendFindings) -> BlendVerdict:
        return self.gate.conclude(self.gate.begin_trial().cache_salt, findings)

    def refusal(self, recipe: Recipe | None = None, salt: str = "") -> str:
        with pytest.raises(InvalidRequest) as caught:
            self.gate.check(recipe or Recipe(), salt)
        assert caught.value.param == "kv_blend"
        return caught.value.message


def test_off_refuses_all_and_the_check_too_and_names_the_setting() -> None:
    bench = Bench("off")
    assert "`controller.kv_blend: verified`" in bench.refusal()
    with pytest.raises(InvalidRequest, match=r"controller\.kv_blend.*pdserve verify --blend"):
        bench.gate.begin_trial()


def test_on_allows_all_even_what_failed() -> None:
    bench = Bench("on")
    bench.gate.check(Recipe(), "")
    bench.verify(FAILED)
    bench.gate.check(Recipe(), "")


def test_verified_refuses_until_the_check_has_passed_and_again_once_it_has_failed() -> None:
    bench = Bench()
    assert "has not passed" in bench.refusal()
    assert "pdserve verify --blend" in bench.refusal()
    assert "controller.kv_blend" in bench.refusal()
    assert bench.verify(PASSED).passed
    bench.gate.check(Recipe(), "")
    assert not bench.verify(FAILED).passed
    assert "mean KL 0.2 nats, allowed 0.05" in bench.refusal()
    bench.verify(PASSED)
    bench.gate.check(Recipe(), "")


def test_a_verdict_is_on_one_model_and_all_that_serve_must_have_passed() -> None:
    bench = Bench()
    bench.verify(PASSED)
    bench.models = frozenset([OTHER])
    bench.refusal()
    bench.models = frozenset([IDENTITY, OTHER])
    bench.refusal()
    with pytest.raises(InvalidRequest, match="different models"):
        bench.gate.begin_trial()
    bench.models = frozenset()
    with pytest.raises(Unavailable):
        bench.gate.check(Recipe(), "")
    bench.models = frozenset([IDENTITY])
    bench.gate.check(Recipe(), "")


@pytest.mark.parametrize(
    ("recipe", "covered"),
    [
        (Recipe(ratio=0.15000000596046448), True),
        (Recipe(ratio=0.5), True),
        (Recipe(ratio="auto"), True),  # at least 0.15
        (Recipe(ratio=0.1), False),
        (Recipe("epic"), False),
    ],
)
def test_it_covers_what_computes_at_least_as_much_anew(recipe: Recipe, covered: bool) -> None:
    bench = Bench()
    bench.verify(PASSED)
    if covered:
        bench.gate.check(recipe, "")
    else:
        bench.refusal(recipe)


def test_methods_have_verdicts_of_their_own() -> None:
    bench = Bench()
    bench.verify(replace(PASSED, method="epic"))
    bench.verify(FAILED)
    bench.gate.check(Recipe("epic", first_tokens=32), "")
    assert "first_tokens 32" in bench.refusal(Recipe("epic", first_tokens=0))
    bench.refusal(Recipe())
    bench.verify(replace(PASSED, ratio=0.3))
    bench.refusal(Recipe(ratio="auto"))


def test_a_check_asks_before_there_is_a_verdict_and_only_it() -> None:
    bench = Bench()
    trial = bench.gate.begin_trial()
    assert trial.model_identity == IDENTITY.hex()
    for _ in range(3):  # each of its requests keeps it alive
        bench.gate.check(Recipe("epic", first_tokens=0), trial.cache_salt)
        bench.now_s += TRIAL_IDLE_S - 1
    bench.refusal(salt="blend-trial-other")
    bench.now_s += 1
    bench.refusal(salt=trial.cache_salt)
    with pytest.raises(InvalidRequest, match="has ended"):
        bench.gate.conclude(trial.cache_salt, PASSED)
    trial = bench.gate.begin_trial()
    bench.gate.conclude(trial.cache_salt, FAILED)
    bench.refusal(salt=trial.cache_salt)


def test_a_verdict_on_a_model_that_changed_meanwhile_is_refused() -> None:
    bench = Bench()
    trial = bench.gate.begin_trial()
    bench.models = frozenset([OTHER])
    with pytest.raises(InvalidRequest, match="another model"):
        bench.gate.conclude(trial.cache_salt, PASSED)
    bench.refusal()


def test_a_check_can_be_concluded_again_where_no_worker_was_ready_to_tell_its_model() -> None:
    bench = Bench()
    trial = bench.gate.begin_trial()
    bench.models = frozenset()
    with pytest.raises(Unavailable, match="Try again"):
        bench.gate.conclude(trial.cache_salt, PASSED)
    bench.models = frozenset([IDENTITY])
    assert bench.gate.conclude(trial.cache_salt, PASSED).passed
    bench.gate.check(Recipe(), "")
    with pytest.raises(InvalidRequest, match="has ended"):
        bench.gate.conclude(trial.cache_salt, FAILED)


def test_trials_are_few_and_the_oldest_ends_first() -> None:
    bench = Bench()
    salts = [bench.gate.begin_trial().cache_salt for _ in range(TRIALS_MOST + 1)]
    bench.refusal(salt=salts[0])
    for salt in salts[1:]:
        bench.gate.check(Recipe(), salt)


def test_status_tells_the_verdicts_on_the_served_models_alone() -> None:
    bench = Bench()
    bench.verify(PASSED)
    failed = bench.verify(replace(FAILED, method="epic"))
    status = bench.gate.status()
    assert (status.setting, status.model_identities) == ("verified", (IDENTITY.hex(),))
    assert [verdict.findings.method for verdict in status.verdicts] == ["epic", "blend"]
    assert status.verdicts[0] == failed
    bench.models = frozenset([OTHER])
    assert bench.gate.status().verdicts == ()


def test_verdicts_outlive_the_controller_and_a_failed_one_too(tmp_path: Path) -> None:
    bench = Bench(shelf=VerdictFile(tmp_path / "state" / "verdicts.json"))
    bench.verify(PASSED)
    bench.gate = bench.restarted()
    bench.gate.check(Recipe(), "")
    bench.verify(FAILED)
    bench.gate = bench.restarted()
    bench.refusal()
    assert bench.gate.status().verdicts[0].findings == FAILED


def test_a_verdict_is_written_before_its_name_is_and_both_survive_the_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "verdicts.json"
    synced: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    VerdictFile(path).save([BlendVerdict(IDENTITY.hex(), 1.0, PASSED)])
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize("content", [b"", b"{", b"[{}]", b"\xff\xfe", b'[{"model_identity": 1}]'])
def test_a_file_that_cannot_be_read_counts_as_never_verified(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "verdicts.json"
    path.write_bytes(content)
    bench = Bench(shelf=VerdictFile(path))
    bench.refusal()
    bench.verify(PASSED)
    bench.gate = bench.restarted()
    bench.gate.check(Recipe(), "")


def test_a_failed_verdict_counts_at_once_even_where_it_cannot_be_written() -> None:
    shelf = ShelfTwin()
    bench = Bench(shelf=shelf)
    bench.verify(PASSED)
    shelf.failure = OSError(28, "No space left on device")
    with pytest.raises(InternalError, match="No space left"):
        bench.verify(FAILED)
    bench.refusal()


def test_the_worker_that_was_picked_is_asked_about_alone() -> None:
    bench = Bench()
    bench.verify(PASSED)
    bench.models = frozenset([IDENTITY, OTHER])
    bench.gate.check_at(IDENTITY, Recipe(), "")
    with pytest.raises(InvalidRequest, match="has not passed"):
        bench.gate.check_at(OTHER, Recipe(), "")
    for setting in ("on", "off"):  # what was let in while it was off asks for no blend
        Bench(setting).gate.check_at(OTHER, Recipe(), "")
    bench.models = frozenset([OTHER])
    bench.gate.check_at(OTHER, Recipe(), bench.gate.begin_trial().cache_salt)


OLD, NEW = b"o" * 32, b"n" * 32


def verified(*models: bytes) -> Bench:
    """Models with a verdict; the workers serve the old one."""
    kept = tuple(BlendVerdict(model.hex(), 1.0, PASSED) for model in models)
    return Bench(shelf=ShelfTwin(kept), models=frozenset([OLD]))


def blended(request_id: str, tokens: int = 20) -> GenerationRequest:
    return replace(asked(tokens), request_id=request_id, kv_blend=KvBlend(Recipe(), (Chunk(0, 32),)))


async def add_pair(twin: ClusterTwin, place: int, model: bytes) -> None:
    await twin.add(WorkerTwin(twin.by_address, f"p{place}", (PREFILL,), identity=model))
    await twin.add(WorkerTwin(twin.by_address, f"d{place}", (DECODE,), identity=model, max_batch=1))


@pytest.mark.parametrize("models", [(OLD,), (OLD, NEW)])
async def test_a_request_that_waited_is_blended_on_a_new_model_only_if_that_has_passed(
    models: tuple[bytes, ...],
) -> None:
    bench = verified(*models)
    async with cluster(blends=bench.gate) as twin:
        await add_pair(twin, 0, OLD)
        running = asyncio.create_task(twin.collect(blended("first", 4000)))
        await twin.until(lambda: bool(twin.workers["d0"].runs), "the only worker is full")
        bench.gate.check(Recipe(), "")
        waiting = asyncio.create_task(twin.collect(blended("second")))
        await twin.until(lambda: twin.service.queued == 1, "it waits")
        await add_pair(twin, 1, NEW)
        if NEW in models:
            assert len((await waiting).token_ids[0]) == 20
        else:
            with pytest.raises(InvalidRequest, match="has not passed") as caught:
                await waiting
            assert caught.value.param == "kv_blend"
            assert not twin.workers["p1"].commands
            timeline = twin.desk.request("second")
            assert timeline is not None
            assert "has not passed" in timeline.summary.error_message
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await twin.until(twin.idle, "nothing of it is left")


async def test_a_request_that_runs_goes_on_though_the_verdict_on_its_model_is_withdrawn() -> None:
    bench = verified(OLD)
    async with cluster(blends=bench.gate) as twin:
        await add_pair(twin, 0, OLD)
        running = asyncio.create_task(twin.collect(blended("first", 200)))
        await twin.until(lambda: bool(twin.workers["d0"].runs), "it runs")
        bench.verify(FAILED)
        await twin.workers["d0"].kill()
        await add_pair(twin, 1, OLD)
        assert len((await running).token_ids[0]) == 200
        with pytest.raises(InvalidRequest, match="failed the check"):
            await twin.collect(blended("second"))
