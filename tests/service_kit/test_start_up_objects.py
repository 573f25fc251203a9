"""What is set apart is walked by no collection, and what comes later still is."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from service_kit.start_up_objects import set_apart

class Node:
    pass

early = Node()
set_apart()
assert gc.get_freeze_count() > 0
assert not any(one is early for one in gc.get_objects())
late = Node()
late.itself, gone = late, weakref.ref(late)
del late
gc.collect()
assert gone() is None
"""


def test_start_up_objects_are_set_apart_and_later_rubbish_is_collected() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
