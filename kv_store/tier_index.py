"""Owns the index of one tier: which pages are there, in which state, who reads them, and which leave when room is needed. Pure.

    ABSENT --begin--> WRITING --commit--> READY(refs) --evict, drop, expire--> EVICTING (while refs > 0) --> ABSENT
                         |
                         +--abort--> ABSENT

Only a READY page is found. Lookup and pin are one call, so nothing is evicted between them. A page that is EVICTING still has its
place, so its bytes count until the last reader is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from kv_store.eviction import EvictionPolicy
from kv_store.lru import Lru
from kv_store.page import Page, PageId
from kv_store.tier import VerifyFailure

State = Literal["writing", "ready", "evicting"]


@dataclass(slots=True, eq=False)
class Entry:
    """place: what the tier needs to find the bytes (a slot, an offset). parent: the key below which it stands, which is its page's
    but where that would close a circle."""

    page: Page
    size_bytes: int
    place: int
    stored_s: float
    expires_s: float  # when its time to live ends
    state: State = "writing"
    refs: int = 0
    held_until_s: float = 0.0  # an operator's pin
    parent: bytes = b""

    @property
    def key(self) -> bytes:
        return self.page.id.key


class TierIndex:
    """`capacity_bytes` for all, `tenant_bytes` for each tenant (0 = no quota). Not thread-safe: its tier holds a lock.

    tenant_policy: makes the policy that chooses what a tenant at its quota gives up; one per tenant, so that finding a page of
    that tenant does not go through the pages of all others.
    """

    def __init__(
        self,
        capacity_bytes: int,
        policy: EvictionPolicy,
        ttl_s: float,
        tenant_bytes: int = 0,
        tenant_policy: Callable[[], EvictionPolicy] = Lru,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._policy = policy
        self._ttl_s = ttl_s
        self._tenant_bytes = tenant_bytes
        self._tenant_policy = tenant_policy
        self._tenant_policies: dict[bytes, EvictionPolicy] = {}  # only with a quota
        self._entries: dict[bytes, Entry] = {}  # in order of arrival, so of expiry too
        self._children: dict[bytes, int] = {}  # parent key -> entries below it
        self._tenants: dict[bytes, int] = {}  # bytes
        self._failures: Counter[VerifyFailure] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def count_in(self, failures: Counter[VerifyFailure]) -> None:
        """Where looks that meet another page under the key are counted from now on."""
        self._failures = failures

    def tenants(self) -> dict[bytes, int]:
        """Bytes per tenant."""
        return dict(self._tenants)

    # ---- writing

    def make_room(self, page: Page, size_bytes: int, now_s: float) -> tuple[bool, list[Entry]]:
        """Whether `page` may come in, and what was evicted for it (gone either way: free their places).

        It may not while it is here already, where its tenant's quota is smaller, or where what is left cannot be evicted.
        """
        evicted: list[Entry] = []
        quota = self._tenant_bytes
        if size_bytes > (min(quota, self.capacity_bytes) if quota else self.capacity_bytes):
            return False, evicted
        here = self._entries.get(page.id.key)
        if here is not None:
            if not self._outlived(here, now_s):
                return False, evicted
            evicted += self.drop(here.key)
        if not quota and self.used_bytes + size_bytes <= self.capacity_bytes:
            return True, evicted
        parent = self._parent_of(page)
        self._children[parent] = self._children.get(parent, 0) + 1  # the parent of a page that comes in is no leaf
        granted = self._make_way(page.tenant, size_bytes, evicted, now_s)
        self._leave_parent(parent)
        return granted, evicted

    def begin(self, page: Page, size_bytes: int, place: int, now_s: float) -> Entry:
        """`page`, for which there is room, is being written to `place`."""
        key, parent = page.id.key, self._parent_of(page)
        assert key not in self._entries
        entry = Entry(page, size_bytes, place, now_s, now_s + self._ttl_s, parent=parent)
        self._entries[key] = entry
        self.used_bytes += size_bytes
        self._tenants[page.tenant] = self._tenants.get(page.tenant, 0) + size_bytes
        self._children[parent] = self._children.get(parent, 0) + 1
        return entry

    def commit(self, entry: Entry) -> None:
        """The bytes are in place: the page can be found."""
        assert entry.state == "writing"
        entry.state = "ready"
        for policy in self._policies_of(entry):
            policy.added(entry.key, entry.size_bytes, entry.page.saving_s)

    def abort(self, entry: Entry) -> None:
        assert entry.state == "writing"
        self._forget(entry)
        self._release(entry)

    # ---- reading

    def present(self, ids: Sequence[PageId], now_s: float) -> int:
        """Length of the longest prefix of `ids` that can be read."""
        for count, page_id in enumerate(ids):
            if self._readable(page_id, now_s) is None:
                return count
        return len(ids)

    def pin(self, ids: Sequence[PageId], now_s: float) -> list[Entry]:
        """The entries of the longest readable prefix of `ids`, each with one reference more. Counts as a hit of each."""
        entries: list[Entry] = []
        for page_id in ids:
            entry = self._readable(page_id, now_s)
            if entry is None:
                break
            entry.refs += 1
            entries.append(entry)
        for entry in reversed(entries):  # a parent is then never older than its child
            for policy in self._policies_of(entry):
                policy.hit(entry.key)
        return entries

    def pin_each(self, ids: Sequence[PageId], now_s: float) -> list[Entry | None]:
        """Those of `ids` that can be read, each with one reference more, None for the others. No hit, the policies do not hear of it:
        for copies that no request asked for, which would make every page look used."""
        entries = [self._readable(page_id, now_s) for page_id in ids]
        for entry in entries:
            if entry is not None:
                entry.refs += 1
        return entries

    def look(self, key: bytes) -> list[Entry]:
        """Like `pin_each`, for one page, whatever its id and its age. Empty if it is not here."""
        entry = self._entries.get(key)
        if entry is None or entry.state != "ready":
            return []
        entry.refs += 1
        return [entry]

    def unpin(self, entries: Iterable[Entry]) -> list[Entry]:
        """Returns those whose place is free now: they were dropped while they were read."""
        freed: list[Entry] = []
        for entry in entries:
            assert entry.refs > 0
            entry.refs -= 1
            if entry.state == "evicting" and not entry.refs:
                self._release(entry)
                freed.append(entry)
        return freed

    # ---- leaving

    def drop(self, key: bytes) -> list[Entry]:
        """Forgets the page under `key`. Returns it if its place is free now, else it is when the last reader is done."""
        entry = self._entries.get(key)
        if entry is None or entry.state != "ready":
            return []
        for policy in self._policies_of(entry):
            policy.removed(key)
        self._forget(entry)
        entry.state = "evicting"
        if entry.refs:
            return []
        self._release(entry)
        return [entry]

    def expire(self, now_s: float) -> list[Entry]:
        """Drops what outlived its time and is read by nobody. Returns the entries whose places are free now."""
        oldest = takewhile(lambda entry: entry.expires_s <= now_s, self._entries.values())
        outlived = [entry.key for entry in oldest if self._outlived(entry, now_s)]
        return [gone for key in outlived for gone in self.drop(key)]

    def trim(self, now_s: float) -> list[Entry]:
        """Evicts what is beyond capacity and quotas: they were lowered, or a start found more than they allow."""
        evicted: list[Entry] = []
        for tenant, policy in list(self._tenant_policies.items()):
            while self._tenants.get(tenant, 0) > self._tenant_bytes and self._evict_one(policy, evicted, now_s):
                pass
        while self.used_bytes > self.capacity_bytes and self._evict_one(self._policy, evicted, now_s):
            pass
        return evicted

    def hold(self, key: bytes, until_s: float) -> bool:
        """Keeps a page from eviction and expiry until then. False if it is not here."""
        entry = self._entries.get(key)
        if entry is None or entry.state != "ready":
            return False
        entry.held_until_s = until_s
        return True

    # ---- parts

    def _readable(self, page_id: PageId, now_s: float) -> Entry | None:
        entry = self._entries.get(page_id.key)
        if entry is None or entry.state != "ready":
            return None
        held = entry.page.id
        if held.fingerprint != page_id.fingerprint or held.tokens != page_id.tokens:
            self._failures["fingerprint"] += 1
            return None
        return entry if entry.expires_s > now_s or entry.held_until_s > now_s else None

    def _outlived(self, entry: Entry, now_s: float) -> bool:
        return entry.expires_s <= now_s and self._idle(entry, now_s)

    def _idle(self, entry: Entry, now_s: float) -> bool:
        return entry.state == "ready" and not entry.refs and entry.held_until_s <= now_s

    def _policies_of(self, entry: Entry) -> tuple[EvictionPolicy, ...]:
        """Of all pages, and where there are quotas that of its tenant's."""
        if not self._tenant_bytes:
            return (self._policy,)
        tenant = entry.page.tenant
        return self._policy, self._tenant_policies.setdefault(tenant, self._tenant_policy())

    def _make_way(self, tenant: bytes, size_bytes: int, evicted: list[Entry], now_s: float) -> bool:
        """Evicts until so many bytes of that tenant fit. False where nothing more can be evicted."""
        quota = self._tenant_bytes
        while quota and self._tenants.get(tenant, 0) + size_bytes > quota:
            policy = self._tenant_policies.get(tenant)
            if policy is None or not self._evict_one(policy, evicted, now_s):
                return False
        while self.used_bytes + size_bytes > self.capacity_bytes:
            if not self._evict_one(self._policy, evicted, now_s):
                return False
        return True

    def _evict_one(self, policy: EvictionPolicy, evicted: list[Entry], now_s: float) -> bool:
        key = policy.victim(lambda key: key not in self._children and self._idle(self._entries[key], now_s))
        if key is None:
            return False
        evicted += self.drop(key)
        return True

    def _parent_of(self, page: Page) -> bytes:
        """Empty where the page would stand below itself, as keys that collide may have it: in a circle nobody is ever a leaf."""
        key, above = page.id.key, page.parent
        if key not in self._children and key != above:
            return above
        while above != key:
            entry = self._entries.get(above)
            if entry is None:
                return page.parent
            above = entry.parent
        return b""

    def _forget(self, entry: Entry) -> None:
        """It is not found any more; its place may still be read."""
        del self._entries[entry.key]
        self._leave_parent(entry.parent)

    def _release(self, entry: Entry) -> None:
        """Its place is free."""
        self.used_bytes -= entry.size_bytes
        tenant = entry.page.tenant
        self._tenants[tenant] -= entry.size_bytes
        if not self._tenants[tenant]:
            del self._tenants[tenant]
            self._tenant_policies.pop(tenant, None)

    def _leave_parent(self, parent: bytes) -> None:
        self._children[parent] -= 1
        if self._children[parent]:
            return
        del self._children[parent]
        above = self._entries.get(parent)
        if above is not None and above.state == "ready":
            for policy in self._policies_of(above):
                policy.bared(parent)
