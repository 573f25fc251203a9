"""Owns the sizes of everything on disk: record, segment, how many there may be within the capacity. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kv_store.page import PageFormat
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS
from pdserve.errors import ConfigInvalid

BLOCK_BYTES = 4096  # what everything in a segment is aligned to
TENANT_BYTES_MOST = 64
_HEADER_FIXED_BYTES = 192  # room for the fixed fields of a record's header and its checksum
_SPARE_SHARE = 16  # one segment of so many is kept free beyond the one that compaction needs
_SEGMENTS_MOST = 512  # each is an open file
_SEGMENT_BYTES = 64 * 2**20
_SEGMENT_BYTES_LEAST = 2**20
_RUN_BYTES = 4 * 2**20
_RUN_RECORDS_MOST = 16


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """capacity_bytes: of all files of the tier together, at any time. ttl_s: from when a page was stored, across restarts.
    tenant_bytes: of the records of one tenant, 0 = no quota. segment_bytes: at most, of one file; 0 = 64 MiB, less where that is
    more than an eighth of the capacity, more where there would be too many files. Another size empties the directory."""

    capacity_bytes: int
    ttl_s: float = 7 * 86400.0
    tenant_bytes: int = 0
    segment_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A segment is one block of its own and `slots` records; a place is segment * slots + slot. A record is a payload, padding to
    whole blocks, and a header behind it: so one write of many records puts each payload before its header."""

    header_bytes: int
    payload_bytes: int
    record_bytes: int
    slots: int
    segments: int
    log_bytes: int  # what the index log may grow to before it is written anew
    total_bytes: int  # of all files together, at most

    @property
    def segment_bytes(self) -> int:
        return BLOCK_BYTES + self.slots * self.record_bytes

    @property
    def records(self) -> int:
        """How many may be alive: the rest of the slots is what makes compaction cheap, and possible at all."""
        return (self.segments - 1 - self.segments // _SPARE_SHARE) * self.slots

    @property
    def logs_bytes(self) -> int:
        """What is not for segments."""
        return self.total_bytes - self.segments * self.segment_bytes

    @property
    def padded_bytes(self) -> int:
        """Of a payload, up to its header."""
        return self.record_bytes - self.header_bytes

    @property
    def run(self) -> int:
        """Adjacent records that go to the disk and come from it in one call, at most."""
        return max(1, min(_RUN_RECORDS_MOST, _RUN_BYTES // self.record_bytes))

    def segment_of(self, place: int) -> int:
        return place // self.slots

    def slot_of(self, place: int) -> int:
        return place % self.slots

    def offset(self, slot: int) -> int:
        return BLOCK_BYTES + slot * self.record_bytes


def layout_of(page_format: PageFormat, limits: DiskLimits) -> Layout:
    """Raises ConfigInvalid where fewer than two segments, or too many, fit into the capacity."""
    unit_key_bytes = page_format.page_tokens // HASH_UNIT_TOKENS * HASH_BYTES
    most_variable = TENANT_BYTES_MOST + unit_key_bytes + page_format.token_bytes
    header_bytes = _aligned(_HEADER_FIXED_BYTES + most_variable)
    record_bytes = header_bytes + _aligned(page_format.size_bytes)
    slots = max(1, (_segment_bytes(limits) - BLOCK_BYTES) // record_bytes)
    line_bytes = _HEADER_FIXED_BYTES + most_variable
    log_share = (
        3 * slots * line_bytes + BLOCK_BYTES
    )  # the log is twice a snapshot at most, and a new one may lie beside it
    segments = (limits.capacity_bytes - BLOCK_BYTES) // (BLOCK_BYTES + slots * record_bytes + log_share)
    if segments < 2:
        raise ConfigInvalid(
            f"A disk tier of {limits.capacity_bytes} bytes does not hold two segments of {slots} pages of {page_format.size_bytes} "
            "bytes: raise store.disk_bytes or lower the segment's size."
        )
    if segments > _SEGMENTS_MOST:
        raise ConfigInvalid(
            f"A disk tier of {limits.capacity_bytes} bytes would be {segments} files, {_SEGMENTS_MOST} are the most: "
            "raise the segment's size."
        )
    log_bytes = segments * (2 * slots * line_bytes + BLOCK_BYTES // 2)
    return Layout(header_bytes, page_format.size_bytes, record_bytes, slots, segments, log_bytes, limits.capacity_bytes)


def _segment_bytes(limits: DiskLimits) -> int:
    chosen = limits.segment_bytes or _SEGMENT_BYTES
    if not limits.segment_bytes:
        while chosen > _SEGMENT_BYTES_LEAST and limits.capacity_bytes < 8 * chosen:
            chosen //= 2
        while limits.capacity_bytes > _SEGMENTS_MOST // 2 * chosen:
            chosen *= 2
    return chosen


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
