"""Owns the API keys: read from the environment once, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.errors import ConfigInvalid
from service_kit.config_file import API_KEYS_VARIABLE

MAX_KEYS = 1000
MIN_KEY_CHARS = 8


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """Empty = no key is asked for (loopback, or `security.insecure`)."""

    keys: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self.keys)} keys)"  # never the keys: this ends up in logs

    def accepts(self, authorization: str | None) -> bool:
        """`authorization`: the header's value, "Bearer KEY". True also where no key is asked for."""
        if not self.keys:
            return True
        scheme, _, presented = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer":
            return False
        candidate = presented.strip().encode()
        matches = [hmac.compare_digest(candidate, key) for key in self.keys]  # all of them: equal time for each key
        return any(matches)


def api_keys_from(environment: Mapping[str, str]) -> ApiKeys:
    """Keys of PDSERVE_API_KEYS, separated by commas. Raises ConfigInvalid for short, empty or unprintable ones."""
    text = environment.get(API_KEYS_VARIABLE, "")
    if not text.strip():
        return ApiKeys()
    keys = [key.strip() for key in text.split(",")]
    if len(keys) > MAX_KEYS:
        raise ConfigInvalid(f"{API_KEYS_VARIABLE}: {len(keys)} keys, at most {MAX_KEYS} are read.")
    for position, key in enumerate(keys):
        if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigInvalid(
                f"{API_KEYS_VARIABLE}: key number {position + 1} must be at least {MIN_KEY_CHARS} printable ASCII characters."
            )
    return ApiKeys(tuple(key.encode() for key in keys))
