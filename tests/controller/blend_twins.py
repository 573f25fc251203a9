"""Owns the in-memory twin of the verdicts' file, and gates over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controller.blend_gate import BlendGate
from controller.blend_verdicts import BlendVerdict
from service_kit.config import BlendSetting

IDENTITY = bytes(range(32))


@dataclass(slots=True)
class ShelfTwin:
    kept: tuple[BlendVerdict, ...] = ()
    failure: OSError | None = None

    def load(self) -> tuple[BlendVerdict, ...]:
        return self.kept

    def save(self, verdicts: Sequence[BlendVerdict]) -> None:
        if self.failure is not None:
            raise self.failure
        self.kept = tuple(verdicts)


def one_model() -> frozenset[bytes]:
    return frozenset([IDENTITY])


def open_gate(setting: BlendSetting = "on", identities: Callable[[], frozenset[bytes]] = one_model) -> BlendGate:
    return BlendGate(setting, ShelfTwin(), identities, time.monotonic, time.time)
