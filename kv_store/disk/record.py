"""Owns the bytes of a page's description and of a record's header, and what makes a record the one that was asked for. Pure.

A header fills whole blocks. Its last 8 bytes are the xxh3_64 of all before them, padding included: every flipped bit shows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from kv_store.disk.layout import TENANT_BYTES_MOST
from kv_store.page import FORMAT_DIGEST_BYTES, Page, PageId
from kv_store.tier import VerifyFailure
from kv_transfer.keys import HASH_BYTES, TOKEN_BYTES

MAGIC = b"pdskvrec"
VERSION = 2
HASH128_BYTES = 16
CHECKSUM_BYTES = 8

# key, parent, fingerprint, saving_s, bytes of: parent, tenant, unit keys; number of tokens
_PAGE = struct.Struct(f"<{HASH_BYTES}s{HASH_BYTES}sQdBBHH")
# magic, version, bytes of the page's description, format digest, payload bytes, payload xxh3_128, stored_s, sequence
_HEADER = struct.Struct(f"<8sHH{FORMAT_DIGEST_BYTES}sQ{HASH128_BYTES}sdQ")


@dataclass(frozen=True, slots=True)
class Record:
    """What a header says. stored_s: wall clock. sequence: grows with every record written; of two copies of a page the one with
    the higher sequence counts."""

    page: Page
    format_digest: bytes
    payload_bytes: int
    payload_hash: bytes
    stored_s: float
    sequence: int


def pack_page(page: Page) -> bytes:
    assert len(page.id.key) == HASH_BYTES
    assert len(page.parent) in (0, HASH_BYTES)
    assert len(page.tenant) <= TENANT_BYTES_MOST
    sizes = len(page.parent), len(page.tenant), len(page.unit_keys), len(page.id.tokens) // TOKEN_BYTES
    fixed = _PAGE.pack(page.id.key, page.parent, page.id.fingerprint, page.saving_s, *sizes)
    return fixed + page.tenant + page.unit_keys + page.id.tokens


def unpack_page(packed: bytes) -> Page:
    """Of bytes whose checksum was right."""
    key, parent, fingerprint, saving_s, parent_bytes, tenant_bytes, unit_bytes, token_count = _PAGE.unpack_from(packed)
    tenant_end = _PAGE.size + tenant_bytes
    unit_end = tenant_end + unit_bytes
    tenant, unit_keys = packed[_PAGE.size : tenant_end], packed[tenant_end:unit_end]
    page_id = PageId(key, fingerprint, packed[unit_end : unit_end + token_count * TOKEN_BYTES])
    return Page(page_id, parent[:parent_bytes], unit_keys, tenant, saving_s)


def pack_header(record: Record, block: memoryview) -> None:
    """Fills `block`."""
    page = pack_page(record.page)
    end, checked = _HEADER.size + len(page), len(block) - CHECKSUM_BYTES
    assert end <= checked
    _HEADER.pack_into(
        block,
        0,
        MAGIC,
        VERSION,
        len(page),
        record.format_digest,
        record.payload_bytes,
        record.payload_hash,
        record.stored_s,
        record.sequence,
    )
    block[_HEADER.size : end] = page
    block[end:checked] = bytes(checked - end)
    block[checked:] = xxhash.xxh3_64_digest(block[:checked])


def unpack_header(block: memoryview) -> Record | None:
    """None where it is no whole header of this version."""
    checked, checksum = block[:-CHECKSUM_BYTES], block[-CHECKSUM_BYTES:]
    magic, version, page_bytes, digest, payload_bytes, payload_hash, stored_s, sequence = _HEADER.unpack_from(block)
    if magic != MAGIC or version != VERSION or xxhash.xxh3_64_digest(checked) != checksum:
        return None
    page = unpack_page(bytes(block[_HEADER.size : _HEADER.size + page_bytes]))
    return Record(page, digest, payload_bytes, payload_hash, stored_s, sequence)


def header_failure(
    record: Record | None, page_id: PageId, format_digest: bytes, payload_bytes: int
) -> VerifyFailure | None:
    """Why `record` is not the page that is meant; None where it is (its payload is yet to be checked)."""
    if record is None:
        return "header"
    if record.format_digest != format_digest or record.page.id.key != page_id.key:
        return "identity"
    if record.page.id != page_id:
        return "fingerprint"
    return None if record.payload_bytes == payload_bytes else "length"


def payload_hash(parts: Sequence[memoryview]) -> bytes:
    """xxh3_128 over all parts, as if they were one."""
    if len(parts) == 1:
        return xxhash.xxh3_128_digest(parts[0])
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()
