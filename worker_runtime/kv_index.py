"""Owns which block hashes one tier of this worker holds, so that a controller can be given a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from kv_transfer.keys import HASH_BYTES

HASHES_PER_EVENT = 16_384  # half a megabyte


class KvIndex:
    def __init__(self) -> None:
        self._hashes: dict[bytes, None] = {}  # insertion order: parents before children

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._hashes

    def stored(self, block_hashes: bytes) -> None:
        self._hashes.update(dict.fromkeys(_cut(block_hashes, HASH_BYTES)))

    def evicted(self, block_hashes: bytes) -> None:
        for key in _cut(block_hashes, HASH_BYTES):
            self._hashes.pop(key, None)

    def snapshot(self) -> list[bytes]:
        """Everything held, in pieces that fit into one message each."""
        return list(_cut(b"".join(self._hashes), HASH_BYTES * HASHES_PER_EVENT))


def _cut(packed: bytes, size: int) -> Iterator[bytes]:
    return (packed[start : start + size] for start in range(0, len(packed), size))
