"""Owns what pulls from peers took, of each peer and of all together, and for how long that is believed. Pure.

Only a pull measures, and nothing is pulled that was measured slower than computing: such a measurement counts for a while alone,
then the next pull measures again. So a peer that is slow for good costs one pull in each `BELIEVED_S`, and one that was slow once
is not given up. A faster one counts until the next pull, which corrects it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import inf

from engine.protocol import KvSource
from kv_store.split import Speed

BELIEVED_S = 30.0
PEERS_REMEMBERED = 256


@dataclass(slots=True)
class _Average:
    speed: Speed
    measured_s: float = 0.0

    def add(self, pages: int, seconds: float, now_s: float) -> None:
        if now_s - self.measured_s >= BELIEVED_S:
            self.speed = Speed(0.0)  # what is no longer believed does not weigh either
        self.speed.measured(pages, seconds)
        self.measured_s = now_s

    def believed(self, now_s: float, compute_page_s: float) -> bool:
        fresh = now_s - self.measured_s < BELIEVED_S
        return self.speed.samples > 0 and (fresh or self.speed.page_s < compute_page_s)


@dataclass(slots=True)
class _Peer:
    """A process: one that was started again has another address."""

    address: str
    average: _Average
    connected: bool = True


class PullSpeeds:
    """Times are of any one clock."""

    def __init__(self, guessed_page_s: float = 0.0) -> None:
        """guessed_page_s: until the first measurement."""
        self.compute_page_s = inf  # what pulls compete with; infinite until it was measured
        self._guess = Speed(guessed_page_s)
        self._all = _Average(Speed(0.0))
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def of(self, source: KvSource | None, now_s: float) -> Speed:
        """Of that peer; of all together where there is nothing to believe of it."""
        peer = self._peer(source) if source is not None else None
        for average in (peer.average, self._all) if peer is not None else (self._all,):
            if average.believed(now_s, self.compute_page_s):
                return average.speed
        return self._guess

    def told(self, now_s: float) -> dict[str, float]:
        """Seconds per page, by worker, the last ones that were pulled from: what was measured and is believed."""
        averages = {worker: peer.average for worker, peer in self._peers.items()}
        return {
            worker: average.speed.page_s
            for worker, average in averages.items()
            if average.believed(now_s, self.compute_page_s)
        }

    def connected(self, source: KvSource) -> bool:
        """Whether a pull that begins now finds the connections open, and may be measured."""
        peer = self._peer(source)
        return peer is not None and peer.connected

    def connect(self, source: KvSource) -> None:
        """A pull from it succeeded: the next one need not connect."""
        peer = self._peer(source) or _Peer(source.address, _Average(Speed(0.0)))
        peer.connected = True
        self._peers[source.worker_id] = peer
        self._peers.move_to_end(source.worker_id)
        if len(self._peers) > PEERS_REMEMBERED:
            self._peers.popitem(last=False)

    def disconnect(self, source: KvSource) -> None:
        """A pull from it failed: the next one may have to connect."""
        peer = self._peer(source)
        if peer is not None:
            peer.connected = False

    def measured(self, source: KvSource, pages: int, seconds: float, now_s: float) -> None:
        """A pull of so many pages, over connections that were open, took so long."""
        self._all.add(pages, seconds, now_s)
        peer = self._peer(source)
        if peer is not None:
            peer.average.add(pages, seconds, now_s)

    def _peer(self, source: KvSource) -> _Peer | None:
        peer = self._peers.get(source.worker_id)
        return peer if peer is not None and peer.address == source.address else None
