"""Owns what a process made while it started: modules, models, tables that stay to its end, which no collection needs to walk."""

from __future__ import annotations

import gc


def set_apart() -> None:
    """Call once, when the process is ready to serve. A full collection stops the process for as long as it takes to walk every
    object: tens of milliseconds with torch imported, in the middle of somebody's stream."""
    gc.collect()
    gc.freeze()
