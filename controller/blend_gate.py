"""Owns whether a request may ask for a blend: the setting, the verdicts of `pdserve verify --blend`, and the checks that run now.

A running check is told apart by a secret cache salt that it was given: its requests pass before there is a verdict.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from controller.blend_verdicts import BlendFindings, BlendVerdict, VerdictShelf
from controller.kv_blend import Recipe
from pdserve.errors import InternalError, InvalidRequest, Unavailable
from service_kit.config import BlendSetting
from service_kit.logs import get_logger

TRIAL_IDLE_S = 900.0  # after the last of its requests
TRIALS_MOST = 8
VERDICTS_KEPT = 64
COMMAND = "pdserve verify --blend"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlendTrial:
    """A check that runs: its requests carry this salt."""

    cache_salt: str
    model_identity: str


@dataclass(frozen=True, slots=True)
class BlendStatus:
    setting: BlendSetting
    model_identities: tuple[str, ...]  # of the ready workers
    verdicts: tuple[BlendVerdict, ...]  # on these models, newest first


class BlendGate:
    """`identities`: KV identities of the ready workers. Called by the event loop's thread."""

    def __init__(
        self,
        setting: BlendSetting,
        shelf: VerdictShelf,
        identities: Callable[[], frozenset[bytes]],
        clock: Callable[[], float],
        unix_now: Callable[[], float],
    ) -> None:
        self._setting = setting
        self._shelf = shelf
        self._identities = identities
        self._clock = clock
        self._unix_now = unix_now
        self._verdicts = {(one.model_identity, one.findings.method): one for one in shelf.load()}  # oldest first
        self._trials: dict[str, tuple[BlendTrial, float]] = {}  # by salt; with when it ends

    def check(self, recipe: Recipe, cache_salt: str) -> None:
        """Raises InvalidRequest where the operator has not allowed it, or the model has not passed; Unavailable where no worker
        tells which model it is."""
        if self._setting == "on" or (self._setting == "verified" and self._trial(cache_salt) is not None):
            return
        if self._setting == "off":
            raise _switched_off()
        identities = self._identities()
        if not identities:
            raise Unavailable("kv_blend: no worker is ready that tells which model is served. Try again.")
        for identity in identities:
            self._check_verdict(self._verdicts.get((identity.hex(), recipe.method)), recipe)

    def check_at(self, identity: bytes, recipe: Recipe, cache_salt: str) -> None:
        """The same for the worker that was picked: it may serve another model than those that were ready when the request came.
        Raises InvalidRequest."""
        if self._setting == "verified" and self._trial(cache_salt) is None:
            self._check_verdict(self._verdicts.get((identity.hex(), recipe.method)), recipe)

    def _check_verdict(self, verdict: BlendVerdict | None, recipe: Recipe) -> None:
        method = recipe.method
        if verdict is None:
            raise _not_passed(f"has not passed the check for method {method!r}")
        when = datetime.fromtimestamp(verdict.decided_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        if not verdict.passed:
            found = "; ".join(verdict.findings.failures)
            raise _not_passed(f"failed the check for method {method!r} on {when} ({found})")
        if not verdict.covers(recipe):
            least = verdict.findings.first_tokens if method == "epic" else verdict.findings.ratio
            name = "first_tokens" if method == "epic" else "ratio"
            raise _not_passed(f"passed the check with {name} {least:g}, not with less")

    def begin_trial(self) -> BlendTrial:
        """Raises InvalidRequest where blends are off, or workers differ; Unavailable where there is none."""
        if self._setting == "off":
            raise _switched_off()
        trial = BlendTrial(f"blend-trial-{secrets.token_hex(16)}", self._one_identity())
        while len(self._trials) >= TRIALS_MOST:
            del self._trials[next(iter(self._trials))]
        self._trials[trial.cache_salt] = trial, self._clock() + TRIAL_IDLE_S
        log.info("blend_trial_begun", model_identity=trial.model_identity)
        return trial

    def conclude(self, cache_salt: str, findings: BlendFindings) -> BlendVerdict:
        """The verdict counts from now on, in the place of an earlier one on this model and method. Raises InvalidRequest where the
        check is not known or another model is served now; InternalError where the verdict will not outlive this controller."""
        trial = self._trial(cache_salt)
        if trial is None:
            raise InvalidRequest(f"trial: is not known, or has ended. Run `{COMMAND}` again.", param="trial")
        if self._one_identity() != trial.model_identity:
            raise InvalidRequest(
                f"trial: another model is served now than when it began. Run `{COMMAND}` again.", param="trial"
            )
        del self._trials[cache_salt]  # not before: where no worker is ready, it is asked again
        verdict = BlendVerdict(trial.model_identity, self._unix_now(), findings)
        place = (verdict.model_identity, findings.method)
        self._verdicts.pop(place, None)
        self._verdicts[place] = verdict
        while len(self._verdicts) > VERDICTS_KEPT:
            del self._verdicts[next(iter(self._verdicts))]
        log.info("blend_verdict", model_identity=trial.model_identity, method=findings.method, passed=verdict.passed)
        try:
            self._shelf.save([*self._verdicts.values()])
        except OSError as error:
            raise InternalError(
                f"The verdict counts only until the controller ends: it cannot be written to the state directory ({error})."
            ) from error
        return verdict

    def status(self) -> BlendStatus:
        served = tuple(sorted(identity.hex() for identity in self._identities()))
        of_served = [verdict for verdict in self._verdicts.values() if verdict.model_identity in served]
        return BlendStatus(self._setting, served, tuple(reversed(of_served)))

    def _one_identity(self) -> str:
        identities = self._identities()
        if not identities:
            raise Unavailable("No worker is ready that tells which model is served. Try again.")
        if len(identities) > 1:
            raise InvalidRequest(
                "Workers of different models (weights, dtype, KV dtype or RoPE) cannot be checked at once."
            )
        return next(iter(identities)).hex()

    def _trial(self, cache_salt: str) -> BlendTrial | None:
        """Every request that asks keeps it alive."""
        now = self._clock()
        self._trials = {salt: held for salt, held in self._trials.items() if held[1] > now}
        held = self._trials.get(cache_salt)
        if held is None:
            return None
        self._trials[cache_salt] = held[0], now + TRIAL_IDLE_S
        return held[0]


def _switched_off() -> InvalidRequest:
    return InvalidRequest(
        "kv_blend: reuse of chunks is approximate and switched off here. Leave it out, or have the operator set "
        f"`controller.kv_blend: verified` and check the model with `{COMMAND}`.",
        param="kv_blend",
    )


def _not_passed(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"kv_blend: this model {why}, and `controller.kv_blend` is `verified`. Leave it out, or have the operator check the model "
        f"with `{COMMAND}`.",
        param="kv_blend",
    )
