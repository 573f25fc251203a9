"""Owns the registered memory of one nixl connection: mappings as a whole and once, staging for all that is no mapping.

What a peer was told of stays registered as long as the connection: an address that is registered anew has another key, which the
peer would not know. The KV arena is a mapping, so its bytes are read where they lie.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from kv_transfer.transport import Buffer
from kv_transfer.transports.nixl_library import Agent, Region, address_of


class NixlMemory:
    """Holds every mapping that it registered, so that no address is used anew meanwhile."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._mappings: dict[int, tuple[mmap.mmap, Region]] = {}
        self._idle_staging: list[mmap.mmap] = []
        self._told: set[int] = set()

    @contextmanager
    def readable(self, buffer: Buffer) -> Iterator[tuple[int, bytes]]:
        """Where the peer reads the bytes of `buffer` inside, and what it must learn first, if anything."""
        mapping = buffer.obj
        if isinstance(mapping, mmap.mmap) and not buffer.readonly:
            yield address_of(buffer), self._new_to_peer(mapping)
            return
        staging = self._take_staging(len(buffer))
        staging[: len(buffer)] = buffer
        try:
            yield address_of(staging), self._new_to_peer(staging)
        finally:
            self._idle_staging.append(staging)

    @contextmanager
    def writable(self, buffer: Buffer) -> Iterator[None]:
        """Our own reads may write into `buffer` inside."""
        mapping = buffer.obj
        if isinstance(mapping, mmap.mmap):
            self._region(mapping)
            yield
            return
        region = self._agent.register(buffer)
        try:
            yield
        finally:
            self._agent.forget(region)

    def _region(self, mapping: mmap.mmap) -> Region:
        known = self._mappings.get(id(mapping))
        if known is None:
            known = self._mappings[id(mapping)] = (mapping, self._agent.register(mapping))
        return known[1]

    def _new_to_peer(self, mapping: mmap.mmap) -> bytes:
        region = self._region(mapping)
        if id(mapping) in self._told:
            return b""
        self._told.add(id(mapping))
        return region.metadata

    def _take_staging(self, size_bytes: int) -> mmap.mmap:
        fitting = [mapping for mapping in self._idle_staging if len(mapping) >= size_bytes]
        if not fitting:
            return mmap.mmap(-1, max(mmap.PAGESIZE, 1 << (size_bytes - 1).bit_length()))
        smallest = min(fitting, key=len)
        self._idle_staging.remove(smallest)
        return smallest
