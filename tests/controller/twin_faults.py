"""Owns the faults of a scripted worker: switches that tests set, before or while it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Faults:
    """All off. Counters count down as they are used."""

    refuse_reserves: int = 0
    ignore_reserves: bool = False
    die_at_prefill: bool = False
    poison: bytes = b""  # dies when it computes a prompt that begins so
    fail_prefills: int = 0
    fail_reason: str = "transfer_failed"
    die_after_tokens: int | None = None
    swallow_activation_report: bool = False
    duplicate: bool = False
    reorder: bool = False
    hold_first_token_s: float = 0.0
    hold_activation_s: float = 0.0
    silent: bool = False
    hang_engine: bool = False
    reset_after_tokens: int | None = None  # the stream breaks once, the process lives
