"""Owns handing the verdict of a check to the controller: again and again while that does not answer, within a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

from pdserve.errors import PdserveError, Unavailable

DEADLINE_S = 30.0  # for the last try to begin
PAUSE_S = 2.0
TRY_S = 10.0


def deliver(
    send: Callable[[], object],
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> PdserveError | None:
    """What stood in the way, last; None where it was taken."""
    until_s = clock() + DEADLINE_S
    while True:
        try:
            send()
        except Unavailable as error:
            if clock() + PAUSE_S > until_s:
                return error
            pause(PAUSE_S)
        except PdserveError as error:
            return error
        else:
            return None
