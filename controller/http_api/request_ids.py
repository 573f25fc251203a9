"""Owns the ids under which HTTP requests run: the client's own where it is free, made unique where it is not."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager


class LiveIds:
    """A retry may carry the id of a request that still runs; both must be told apart inside."""

    def __init__(self) -> None:
        self._live: set[str] = set()

    @contextmanager
    def hold(self, presented: str) -> Iterator[str]:
        """Yields `presented`, or with a suffix while another request holds it."""
        request_id = presented if presented not in self._live else f"{presented}-{secrets.token_hex(4)}"
        self._live.add(request_id)
        try:
            yield request_id
        finally:
            self._live.discard(request_id)
