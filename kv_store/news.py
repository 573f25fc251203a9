"""Owns the order in which a tier's changes are told: as they happened, whoever tells them, outside all locks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

from kv_store.page import Page
from kv_store.tier import Change, TierListener

Take = Callable[[], Sequence[tuple[Change, Page]]]


class News:
    """take: what happened since it was last called, in order, once. A thread that comes while another one tells leaves its changes
    to that one: told side by side, "stored" and "evicted" of one page could change places."""

    def __init__(self, take: Take, listener: TierListener) -> None:
        self._take = take
        self._listener = listener
        self._lock = threading.Lock()
        self._telling = False
        self._asked = False

    def tell(self) -> None:
        with self._lock:
            self._asked = True
            if self._telling:
                return
            self._telling = True
        while self._more():
            for change, pages in groupby(self._take(), key=itemgetter(0)):
                self._listener(change, [page for _, page in pages])

    def _more(self) -> bool:
        with self._lock:
            self._telling = self._asked
            self._asked = False
            return self._telling
