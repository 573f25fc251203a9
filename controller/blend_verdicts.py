"""Owns what `pdserve verify --blend` found of a model: verdicts, what they cover, and the file that keeps them over restarts.

Field names are those of the operator API's JSON.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from controller.blend_ratio import FLOOR
from controller.kv_blend import Method, Recipe
from service_kit.logs import get_logger

VERDICTS_FILE = "blend-verdicts.json"
ROUNDING = 1e-6  # a ratio that came over gRPC is a float32

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlendFigures:
    """Of the next token, full prefill against blended; or what is allowed of them."""

    mean_kl_nats: float
    max_kl_nats: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class BlendFindings:
    """What a check measured with one recipe, and against which thresholds. `failures`: empty = passed."""

    method: Method
    ratio: float
    first_tokens: int
    blended_prompts: int
    figures: BlendFigures
    allowed: BlendFigures
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlendVerdict:
    model_identity: str  # hexadecimal digest: weights, dtype, KV dtype, RoPE
    decided_unix_s: float
    findings: BlendFindings

    @property
    def passed(self) -> bool:
        return not self.findings.failures

    def covers(self, recipe: Recipe) -> bool:
        """Whether at least as much is computed anew as in the check."""
        found = self.findings
        if recipe.method != found.method:
            return False
        if recipe.method == "epic":
            return recipe.first_tokens >= found.first_tokens
        return (FLOOR if recipe.ratio == "auto" else recipe.ratio) >= found.ratio - ROUNDING


class VerdictShelf(Protocol):
    """Keeps verdicts longer than a controller lives."""

    def load(self) -> tuple[BlendVerdict, ...]:
        """Empty where there is nothing that can be read."""

    def save(self, verdicts: Sequence[BlendVerdict]) -> None:
        """All or nothing. Raises OSError."""


class VerdictFile:
    """Implements VerdictShelf. What cannot be read counts as never verified: the check is asked for again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> tuple[BlendVerdict, ...]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=tuple[BlendVerdict, ...])
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("blend_verdicts_unreadable", path=str(self._path), message=str(error))
            return ()

    def save(self, verdicts: Sequence[BlendVerdict]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with draft.open("wb") as file:
            file.write(msgspec.json.encode(tuple(verdicts)))
            file.flush()
            os.fsync(file.fileno())  # a withdrawn verdict must not come back with the power
        draft.replace(self._path)
        self._sync_name()

    def _sync_name(self) -> None:
        """The content is safe, but until the folder is too, the name may lead to the earlier one."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
