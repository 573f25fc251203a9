"""Owns what a stored page of KV is: its id, what is known of it, and the format that all pages of a store share. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES
from pdserve.errors import ConfigInvalid

FORMAT_DIGEST_BYTES = 16

# uint8 [layers, block_bytes]: one page through all layers. Rows are contiguous; the rows of a page in the KV arena lie apart.
PageBytes: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PageId:
    """Names one full page. key: chained key of its last hash unit, or content key of a chunk's page, 32 bytes.
    fingerprint: keyed xxh3_64 over the tokens, chained like the key but independent of it. tokens: the ids that the page was
    computed from, int32 little-endian, `PageFormat.token_bytes` of them; what lies before it they leave to key and fingerprint.
    Equal keys with an unequal rest are two different pages, and the second is a miss."""

    key: bytes
    fingerprint: int
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """A page that may be stored. parent: key of the page before it, empty at the start of a chain (and for chunks).
    unit_keys: chained keys of its hash units, the last one is `id.key`; events to the controller name all of them.
    tenant: digest that quotas are counted by, empty without one. saving_s: seconds to compute it again, and in a tier those that
    a hit there saves (kv_store.benefit); 0: not measured."""

    id: PageId
    parent: bytes = b""
    unit_keys: bytes = b""
    tenant: bytes = b""
    saving_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PageFormat:
    """What must be equal for the bytes of a page to be usable. identity: digest of model, weights, dtype, heads, RoPE
    (`kv_transfer.keys.identity_digest`); the rest is representation. block_bytes: of one layer, K and V together."""

    identity: bytes
    page_tokens: int
    layers: int
    block_bytes: int

    def __post_init__(self) -> None:
        if len(self.identity) != HASH_BYTES or min(self.page_tokens, self.layers, self.block_bytes) < 1:
            raise ConfigInvalid(f"{self} is no format of KV pages: sizes must be positive, the identity 32 bytes.")
        if self.page_tokens % HASH_UNIT_TOKENS:
            raise ConfigInvalid(
                f"Pages of {self.page_tokens} tokens have no keys: use multiples of {HASH_UNIT_TOKENS}."
            )

    @property
    def size_bytes(self) -> int:
        """Of one page."""
        return self.layers * self.block_bytes

    @property
    def token_bytes(self) -> int:
        """Of the ids of one page."""
        return self.page_tokens * TOKEN_BYTES

    def digest(self) -> bytes:
        """16 bytes that stand for all fields and for what is kept beside the bytes; part of every header at rest, and of the names
        of what is stored: what another version stored is not looked at."""
        text = f"pdserve-kv-page-v2 {self.identity.hex()} {self.page_tokens} {self.layers} {self.block_bytes}"
        return hashlib.sha256(text.encode()).digest()[:FORMAT_DIGEST_BYTES]

    def empty(self) -> PageBytes:
        return np.empty((self.layers, self.block_bytes), dtype=np.uint8)
