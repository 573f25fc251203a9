"""Owns the cost-aware eviction policy, greedy dual-size with frequency (Cherkasova 1998). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from kv_store.benefit import LEAST_BENEFIT_S
from kv_store.eviction import Evictable
from kv_store.eviction_queue import Parked

HALF_LIFE_TURNS = 1.0  # uses count half after as many pages came in as are here
SLACK = 64  # stale heap items that are not worth a rebuild


@dataclass(slots=True)
class _Ranked:
    size_bytes: int
    saving_s: float
    uses: float
    used_turn: float
    priority: float
    serial: int  # of its valid heap item; ties leave in the order of use


class Gdsf:
    """Implements kv_store.eviction.EvictionPolicy. The page of lowest `clock + uses * saving / size` leaves.

    The clock is the priority of the last page that left, so that what was useful once does not stay for ever; uses are halved with
    every turn over of the tier for the same reason.

    A parent counts no less than its child: the tier gives up leaves first, and a page passed over for its children is the next to
    leave once it lost them.

    A page whose saving was not measured counts as much as the last one that was. Until there is one, all count the same, in a unit
    that the first measured one then sets for all of them. One that is worth nothing here says nothing of the others.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, _Ranked] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._parked = Parked()
        self._clock = 0.0
        self._turns = 0.0
        self._measured_s = 0.0
        self._serial = 0
        self._victim: bytes | None = None

    def added(self, key: bytes, size_bytes: int, saving_s: float) -> None:
        worthless = 0.0 < saving_s <= LEAST_BENEFIT_S
        if saving_s and not worthless:
            if not self._measured_s:
                self._set_unit(saving_s)
            self._measured_s = saving_s
        counted_s = saving_s if worthless else self._measured_s or 1.0
        self._turns += 1.0 / (len(self._pages) + 1)
        self._pages[key] = _Ranked(size_bytes, counted_s, 1.0, self._turns, 0.0, 0)
        self._rank(key)

    def hit(self, key: bytes) -> None:
        page = self._pages[key]
        page.uses = 1.0 + page.uses * 0.5 ** ((self._turns - page.used_turn) / HALF_LIFE_TURNS)
        page.used_turn = self._turns
        if key in self._parked:
            self._parked.leave(key)
        self._rank(key)

    def victim(self, evictable: Evictable) -> bytes | None:
        self._victim = self._parked.some(evictable) or self._lowest(evictable) or self._parked.any(evictable)
        return self._victim

    def bared(self, key: bytes) -> None:
        self._parked.bared(key)

    def removed(self, key: bytes) -> None:
        page = self._pages.pop(key)
        if key in self._parked:
            self._parked.leave(key)
        if key == self._victim:
            self._clock = max(self._clock, page.priority)
        self._victim = None

    def _set_unit(self, saving_s: float) -> None:
        """What counted 1 so far counts so many seconds; the order stays."""
        self._clock *= saving_s
        for page in self._pages.values():
            page.saving_s *= saving_s
            page.priority *= saving_s
        self._heap = [(page.priority, page.serial, key) for key, page in self._pages.items() if key not in self._parked]
        heapify(self._heap)

    def _lowest(self, evictable: Evictable) -> bytes | None:
        while self._heap:
            _, serial, key = self._heap[0]
            if self._valid(key, serial):
                if evictable(key):
                    return key
                self._parked.park(key)
            heappop(self._heap)
        return None

    def _valid(self, key: bytes, serial: int) -> bool:
        page = self._pages.get(key)
        return page is not None and page.serial == serial

    def _rank(self, key: bytes) -> None:
        page = self._pages[key]
        self._serial += 1
        page.serial = self._serial
        page.priority = self._clock + page.uses * page.saving_s / page.size_bytes
        heappush(self._heap, (page.priority, page.serial, key))
        if len(self._heap) > 2 * len(self._pages) + SLACK:
            self._heap = [item for item in self._heap if self._valid(item[2], item[1])]
            heapify(self._heap)
