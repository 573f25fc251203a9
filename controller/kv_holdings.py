"""Owns what one worker's KV events say it holds, tier by tier, and how much of a prompt that is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Set

from controller.kv_prices import NOTHING_MEASURED, KvPrices
from controller.placement.snapshot import Reuse
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, split_keys
from pdserve.v1 import worker_pb2

DEVICE_TIER = "device"


class KvHoldings:
    """Events are numbered without gaps; a message that begins with CLEARED starts afresh, with whatever number."""

    def __init__(self) -> None:
        self._tiers: dict[bytes, set[str]] = {}
        self._units: dict[str, int] = {}  # per tier
        self._next_sequence = 0  # 0: nothing is known yet
        self.changes = 0  # messages applied: what was looked up holds while it stays

    def apply(self, message: worker_pb2.KvEvents) -> bool:
        """False where events are missing: what is known is not the whole truth any more, a snapshot must be asked for."""
        afresh = bool(message.events) and message.events[0].kind == worker_pb2.KvEvent.KIND_CLEARED
        if not afresh and message.first_sequence != self._next_sequence:
            return False
        self._next_sequence = message.first_sequence + len(message.events)
        self.changes += 1
        for event in message.events:
            self._apply(event)
        return True

    def units(self) -> dict[str, int]:
        """Hash units per tier."""
        return {tier: count for tier, count in self._units.items() if count}

    def reuse(self, block_hashes: bytes, prices: KvPrices = NOTHING_MEASURED) -> Reuse:
        """How much of a prompt with these keys lies here, each part taken from the nearest tier. Found by bisection: chains are
        evicted from their end, so a hole, which would make this wrong, is rare; and placement survives a wrong guess."""
        count = len(block_hashes) // HASH_BYTES
        held = on_device = self._reach(block_hashes, 0, count, DEVICE_TIER)
        anywhere = self._reach(block_hashes, held, count, "")
        load = 0.0
        for tier in prices.tiers if anywhere > held else ():
            reach = self._reach(block_hashes, held, anywhere, tier)
            load += (reach - held) * prices.of_tier(tier)
            held = reach
        load += (anywhere - held) * prices.of_tier("")
        return Reuse(on_device * HASH_UNIT_TOKENS, (anywhere - on_device) * HASH_UNIT_TOKENS, load * HASH_UNIT_TOKENS)

    def units_by_tier(self, keys: Iterable[bytes], nearest: Iterable[str]) -> dict[str, int] | None:
        """How many of these units lie on the device, in each of the tiers `nearest` but no nearer one, and elsewhere (""). None where
        one is nowhere."""
        order, tiers_of = (DEVICE_TIER, *nearest), self._tiers.get
        held = dict.fromkeys((*order, ""), 0)
        for key in keys:
            tiers = tiers_of(key)
            if not tiers:
                return None
            for tier in order:
                if tier in tiers:
                    held[tier] += 1
                    break
            else:
                held[""] += 1
        return held

    def tiers_of_units(self, block_hashes: bytes) -> list[Set[str]]:
        """For each unit of a prompt the tiers that have it, looked up one by one: for operators."""
        return [self._tiers.get(key, frozenset()) for key in split_keys(block_hashes)]

    def _reach(self, block_hashes: bytes, held: int, count: int, tier: str) -> int:
        """tier: empty for any."""
        low, high = held, count  # units before `low` are held, the one at `high` is not
        while low < high:
            middle = (low + high) // 2
            tiers = self._tiers.get(block_hashes[middle * HASH_BYTES : (middle + 1) * HASH_BYTES], ())
            if tier in tiers if tier else tiers:
                low = middle + 1
            else:
                high = middle
        return low

    def _apply(self, event: worker_pb2.KvEvent) -> None:
        match event.kind:
            case worker_pb2.KvEvent.KIND_CLEARED:
                self._tiers.clear()
                self._units.clear()
            case worker_pb2.KvEvent.KIND_STORED:
                for key in split_keys(event.block_hashes):
                    tiers = self._tiers.setdefault(key, set())
                    self._units[event.tier] = self._units.get(event.tier, 0) + (event.tier not in tiers)
                    tiers.add(event.tier)
            case worker_pb2.KvEvent.KIND_EVICTED:
                for key in split_keys(event.block_hashes):
                    self._leave(key, event.tier)
            case _:
                pass  # of a newer worker

    def _leave(self, key: bytes, tier: str) -> None:
        tiers = self._tiers.get(key)
        if tiers is None or tier not in tiers:
            return
        tiers.remove(tier)
        self._units[tier] -= 1
        if not tiers:
            del self._tiers[key]
