"""Owns how a thread of the store lets the other threads of its process have the interpreter."""

from __future__ import annotations

import time

# Longer than a thread takes to wake up. What a copy of a page releases is shorter: whoever waits for the interpreter finds it taken
# again, and so on until its switch interval of 5 ms is over, as long as copies follow each other.
_RELEASED_S = 20e-6


def give_way() -> None:
    """To be called where a batch of pages took about half a millisecond. Takes a tenth of a millisecond, and no CPU."""
    time.sleep(_RELEASED_S)
