"""Owns the bytes of a page as one Redis value: a header that names the page and checks the payload after it. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from kv_store.page import FORMAT_DIGEST_BYTES, PageBytes, PageFormat, PageId
from kv_store.tier import VerifyFailure
from kv_transfer.keys import HASH_BYTES

MAGIC = b"pdskvred"
VERSION = 1
# magic, version, format digest, key, fingerprint, payload bytes, payload xxh3_128, stored at (wall clock, seconds)
_FIELDS = struct.Struct(f"<8sH{FORMAT_DIGEST_BYTES}s{HASH_BYTES}sQQ16sd")
_SEAL_BYTES = 8  # xxh3_64 of the fields: every flipped bit of a header shows
HEADER_BYTES = _FIELDS.size + _SEAL_BYTES


@dataclass(frozen=True, slots=True)
class HeaderFields:
    """What a header says of its page, for those who did not ask for one in particular."""

    fingerprint: int
    payload_bytes: int
    stored_s: float


def pack_value(page_id: PageId, page_format: PageFormat, content: PageBytes, stored_s: float) -> bytearray:
    """content: uint8 [layers, block_bytes]; its rows may lie apart."""
    value = bytearray(HEADER_BYTES + page_format.size_bytes)
    payload = memoryview(value)[HEADER_BYTES:]
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
    value[:HEADER_BYTES] = fields + xxhash.xxh3_64_digest(fields)
    return value


def header_failure(value: bytes, page_id: PageId, page_format: PageFormat) -> VerifyFailure | None:
    """Why `value`, or its first HEADER_BYTES, is not the page that is meant; None where it is, as far as its header says."""
    if len(value) < HEADER_BYTES:
        return "length"
    fields, seal = value[: _FIELDS.size], value[_FIELDS.size : HEADER_BYTES]
    magic, version, digest, key, fingerprint, payload_bytes, _, _ = _FIELDS.unpack(fields)
    if magic != MAGIC or version != VERSION or xxhash.xxh3_64_digest(fields) != seal:
        return "header"
    if digest != page_format.digest() or key != page_id.key:
        return "identity"
    if fingerprint != page_id.fingerprint:
        return "fingerprint"
    return None if payload_bytes == page_format.size_bytes else "length"


def header_fields(value: bytes) -> HeaderFields | None:
    """Unverified; None where there is no whole header."""
    if len(value) < HEADER_BYTES:
        return None
    _, _, _, _, fingerprint, payload_bytes, _, stored_s = _FIELDS.unpack_from(value)
    return HeaderFields(fingerprint, payload_bytes, stored_s)


def value_failure(value: bytes, page_id: PageId, page_format: PageFormat) -> VerifyFailure | None:
    """Why `value` is not, whole and unchanged, the page that is meant; None where it is."""
    failure = header_failure(value, page_id, page_format)
    if failure is not None:
        return failure
    if len(value) != HEADER_BYTES + page_format.size_bytes:
        return "length"
    checksum = _FIELDS.unpack_from(value)[6]
    return None if xxhash.xxh3_128_digest(memoryview(value)[HEADER_BYTES:]) == checksum else "checksum"


def copy_payload(value: bytes, page_format: PageFormat, into: PageBytes) -> None:
    """Of a value without failure."""
    np.copyto(into, _rows(memoryview(value)[HEADER_BYTES:], page_format))


def _rows(payload: memoryview, page_format: PageFormat) -> PageBytes:
    flat: PageBytes = np.frombuffer(payload, dtype=np.uint8)
    return flat.reshape(page_format.layers, page_format.block_bytes)
