"""Owns identity keys: the namespace digest and the chained block hashes. Pure, torch-free.

The hash unit is fixed at 16 tokens whatever the page size of a pool, so keys agree between workers of different layout.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import xxhash

HASH_UNIT_TOKENS = 16
HASH_BYTES = 32
TOKEN_BYTES = 4  # int32, little-endian
_UNIT_BYTES = HASH_UNIT_TOKENS * TOKEN_BYTES
_CHUNK_SEED = 0x9E3779B97F4A7C15  # set off against that of prompts, any odd number would do


class UnitHash(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes:
        """HASH_BYTES bytes."""


# Of one unit, begun with its parent's key; and of a page's tokens, with its parent's fingerprint as seed. Tests that make different
# pages collide put shortened ones here, in a process of their own; no setting reaches them.
unit_hash: Callable[[bytes], UnitHash] = hashlib.sha256
fingerprint_hash: Callable[[bytes, int], int] = xxhash.xxh3_64_intdigest


def identity_digest(fields: Iterable[tuple[str, str]]) -> bytes:
    """SHA-256 over tagged fields: model, weights digest, logical KV dtype, heads, RoPE parameters, adapter.

    Every field is length-prefixed with its tag, so that no two field lists share an encoding. Layout and page size are
    representation and must not be passed. Returns 32 bytes.
    """
    digest = hashlib.sha256(b"pdserve-kv-identity-v1")
    for tag, value in fields:
        for part in (tag.encode(), value.encode()):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part)
    return digest.digest()


def namespace_root(identity: bytes, tenant_salt: str = "") -> bytes:
    """Parent of the first block: the identity digest, keyed by the tenant's salt where there is one. Returns 32 bytes."""
    if not tenant_salt:
        return identity
    return hmac.new(tenant_salt.encode(), identity, hashlib.sha256).digest()


def tenant_digest(tenant_salt: str) -> bytes:
    """Names a tenant in the books of the tiers, 8 bytes; empty without a salt. Keys do not depend on it."""
    return hashlib.sha256(b"pdserve-kv-tenant-v1" + tenant_salt.encode()).digest()[:8] if tenant_salt else b""


def chain_hashes(parent: bytes, token_ids: bytes) -> bytes:
    """Keys of the full hash units of `token_ids` (int32 little-endian): SHA-256(parent || tokens of the unit), chained.

    Returns 32 bytes per full unit, concatenated; an incomplete last unit has no key. `parent` is `namespace_root(...)` for the
    start of a prompt, or the key of the unit before.
    """
    view = memoryview(token_ids)
    begun = unit_hash
    keys: list[bytes] = []
    for start in range(0, len(view) - _UNIT_BYTES + 1, _UNIT_BYTES):
        digest = begun(parent)
        digest.update(view[start : start + _UNIT_BYTES])
        parent = digest.digest()
        keys.append(parent)
    return b"".join(keys)


def split_keys(packed: bytes) -> Iterator[bytes]:
    """The keys of `chain_hashes` one by one."""
    return (packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))


def chunk_hashes(root: bytes, token_ids: bytes) -> bytes:
    """Keys of a chunk by its content, wherever it stands: of its hash units, the last one filled up (`padded_chunk`).

    root: `namespace_root(...)`. All keys depend on the whole chunk, and none is ever one of a prompt's chain.
    """
    content = hashlib.sha256(b"pdserve-kv-chunk-v1" + root + len(token_ids).to_bytes(8, "little"))
    content.update(token_ids)
    return chain_hashes(content.digest(), padded_chunk(token_ids, HASH_UNIT_TOKENS))


def padded_chunk(token_ids: bytes, page_tokens: int) -> bytes:
    """`token_ids` (int32) filled up with -1 to whole pages."""
    return token_ids + b"\xff" * (-len(token_ids) % (page_tokens * TOKEN_BYTES))


def fingerprint_seed(identity: bytes) -> int:
    """Key of the token fingerprints (xxh3_64) that are kept beside the chained keys. The same in every process that serves this
    identity, because pages outlive processes."""
    return int.from_bytes(identity[:8], "little")


def page_fingerprint(token_ids: bytes, before: int) -> int:
    """Of a page's tokens. before: fingerprint of the page before it, or the seed of the chain."""
    return fingerprint_hash(token_ids, before)


def chunk_seed(prompt_seed: int) -> int:
    """Key of the fingerprints of chunks, beside `fingerprint_seed`: a chunk's KV is kept before rotation, so that pages of the same
    tokens are not the same pages."""
    return prompt_seed ^ _CHUNK_SEED
