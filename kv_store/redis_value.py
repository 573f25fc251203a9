"""Owns the bytes of a page as one Redis value: a header that names the page, tokens too, and checks the payload after it. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from kv_store.page import FORMAT_DIGEST_BYTES, PageBytes, PageFormat, PageId
from kv_store.tier import VerifyFailure
from kv_transfer.keys import HASH_BYTES

MAGIC = b"pdskvred"
VERSION = 2
# magic, version, format digest, key, fingerprint, payload bytes, payload xxh3_128, stored at (wall clock, seconds)
_FIELDS = struct.Struct(f"<8sH{FORMAT_DIGEST_BYTES}s{HASH_BYTES}sQQ16sd")
_SEAL_BYTES = 8  # behind the fields and the page's tokens, the xxh3_64 of both: every flipped bit of a header shows


@dataclass(frozen=True, slots=True)
class HeaderFields:
    """What a header says of its page, for those who did not ask for one in particular."""

    page_id: PageId
    payload_bytes: int
    stored_s: float


def header_bytes(page_format: PageFormat) -> int:
    return _FIELDS.size + page_format.token_bytes + _SEAL_BYTES


def pack_value(page_id: PageId, page_format: PageFormat, content: PageBytes, stored_s: float) -> bytearray:
    """content: uint8 [layers, block_bytes]; its rows may lie apart."""
    assert len(page_id.tokens) == page_format.token_bytes
    start = header_bytes(page_format)
    value = bytearray(start + page_format.size_bytes)
    payload = memoryview(value)[start:]
    np.copyto(_rows(payload, page_format), content)
    checksum = xxhash.xxh3_128_digest(payload)
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        page_format.digest(),
        page_id.key,
        page_id.fingerprint,
        page_format.size_bytes,
        checksum,
        stored_s,
    )
    sealed = fields + page_id.tokens
    value[:start] = sealed + xxhash.xxh3_64_digest(sealed)
    return value


def header_failure(value: bytes, page_id: PageId, page_format: PageFormat) -> VerifyFailure | None:
    """Why `value`, or its first `header_bytes`, is not the page that is meant; None where it is, as far as its header says."""
    start = header_bytes(page_format)
    if len(value) < start:
        return "length"
    sealed, seal = value[: start - _SEAL_BYTES], value[start - _SEAL_BYTES : start]
    magic, version, digest, key, fingerprint, payload_bytes, _, _ = _FIELDS.unpack_from(sealed)
    if magic != MAGIC or version != VERSION or xxhash.xxh3_64_digest(sealed) != seal:
        return "header"
    if digest != page_format.digest() or key != page_id.key:
        return "identity"
    if fingerprint != page_id.fingerprint or sealed[_FIELDS.size :] != page_id.tokens:
        return "fingerprint"
    return None if payload_bytes == page_format.size_bytes else "length"


def header_fields(value: bytes, page_format: PageFormat) -> HeaderFields | None:
    """Unverified; None where there is no whole header."""
    if len(value) < header_bytes(page_format):
        return None
    _, _, _, key, fingerprint, payload_bytes, _, stored_s = _FIELDS.unpack_from(value)
    tokens = value[_FIELDS.size : header_bytes(page_format) - _SEAL_BYTES]
    return HeaderFields(PageId(key, fingerprint, tokens), payload_bytes, stored_s)


def value_failure(value: bytes, page_id: PageId, page_format: PageFormat) -> VerifyFailure | None:
    """Why `value` is not, whole and unchanged, the page that is meant; None where it is."""
    failure = header_failure(value, page_id, page_format)
    if failure is not None:
        return failure
    start = header_bytes(page_format)
    if len(value) != start + page_format.size_bytes:
        return "length"
    checksum = _FIELDS.unpack_from(value)[6]
    return None if xxhash.xxh3_128_digest(memoryview(value)[start:]) == checksum else "checksum"


def copy_payload(value: bytes, page_format: PageFormat, into: PageBytes) -> None:
    """Of a value without failure."""
    np.copyto(into, _rows(memoryview(value)[header_bytes(page_format) :], page_format))


def _rows(payload: memoryview, page_format: PageFormat) -> PageBytes:
    flat: PageBytes = np.frombuffer(payload, dtype=np.uint8)
    return flat.reshape(page_format.layers, page_format.block_bytes)
