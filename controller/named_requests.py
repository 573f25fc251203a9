"""Owns which request a caller's id names: one that lives, or one that has ended and whose caller may still resume it. Pure."""

from __future__ import annotations

from collections import OrderedDict

from controller.live_request import LiveRequest

RETAINED_S = 15.0  # ended requests whose caller may still resume
RETAINED_REQUESTS = 512


class NamedRequests:
    def __init__(self) -> None:
        self._live: dict[str, LiveRequest] = {}
        self._retained: OrderedDict[str, tuple[float, LiveRequest]] = OrderedDict()  # until when; oldest first

    def add(self, live: LiveRequest) -> None:
        """From now on its id names this one."""
        self._live[live.request.request_id] = live

    def live(self, request_id: str) -> LiveRequest | None:
        return self._live.get(request_id)

    def resumable(self, request_id: str) -> LiveRequest | None:
        """Live or ended."""
        kept = self._retained.get(request_id)
        return self._live.get(request_id) or (kept[1] if kept is not None else None)

    def ended(self, live: LiveRequest, now: float) -> None:
        """One whose caller said that it may come back is kept for a while, unless it failed."""
        request_id = live.request.request_id
        if self._live.get(request_id) is live:
            del self._live[request_id]
        if live.request.linger_s > 0 and live.error is None:
            self._retained[request_id] = (now + RETAINED_S, live)
            while len(self._retained) > RETAINED_REQUESTS:
                self._retained.popitem(last=False)

    def expire(self, now: float) -> None:
        while self._retained:
            request_id, (until_s, _) = next(iter(self._retained.items()))
            if until_s > now:
                break
            del self._retained[request_id]
