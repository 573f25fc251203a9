"""Owns what the routes share: the controller's two protocols, the model, limits, clock and seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from controller.http_api.prompts import PromptTokenizer
from controller.http_api.sampling import Limits, MintSeed
from controller.operations import ModelInfo, Operations
from controller.request import Generator
from service_kit.metrics import Metrics


@dataclass(frozen=True, slots=True)
class ApiContext:
    generator: Generator
    operations: Operations
    model: ModelInfo
    metrics: Metrics
    prompts: PromptTokenizer
    limits: Limits
    keepalive_s: float
    mint_seed: MintSeed
    unix_now: Callable[[], float]
