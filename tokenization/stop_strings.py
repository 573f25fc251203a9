"""Owns the search for stop strings in streamed text. Pure.

An Aho-Corasick automaton (Aho & Corasick 1975) over all stop strings: its depth is at any time the longest suffix that may still
become a stop string, which is exactly what must be held back. The match that is completed first wins; of several that end
together, the longest.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(slots=True)
class _Node:
    depth: int = 0
    next: dict[str, _Node] = field(default_factory=dict)
    fail: _Node | None = None
    match: str | None = None  # the longest stop string that ends here


@dataclass(frozen=True, slots=True)
class _Automaton:
    root: _Node
    opening: re.Pattern[str]  # any character with which a stop string begins


@dataclass(frozen=True, slots=True)
class StopResult:
    """`text` may be shown now; `stop` is the stop string that was completed, after which nothing more comes."""

    text: str
    stop: str | None = None


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    root = _Node()
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.match = stop
    queue: deque[_Node] = deque([root])
    while queue:
        parent = queue.popleft()
        for char, child in parent.next.items():
            child.fail = root if parent is root else _step(parent.fail or root, char, root)
            child.match = child.match or child.fail.match
            queue.append(child)
    return _Automaton(root, re.compile("[" + re.escape("".join(sorted(root.next))) + "]"))


def _step(node: _Node, char: str, root: _Node) -> _Node:
    current: _Node | None = node
    while current is not None:
        if (following := current.next.get(char)) is not None:
            return following
        current = current.fail
    return root


class StopMatcher:
    """One choice's matcher. Any split of the text gives the same result."""

    __slots__ = ("_automaton", "_held", "_include_stop", "_node", "_stop")

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        assert all(stops), "empty stop strings are refused at the border"
        self._automaton = _automaton(stops) if stops else None
        self._include_stop = include_stop
        self._node = self._automaton.root if self._automaton else _Node()
        self._held = ""
        self._stop: str | None = None

    def feed(self, text: str) -> StopResult:
        """Text that may be shown, and the stop string once it is complete; after that the matcher stays silent."""
        if self._stop is not None:
            return StopResult("", self._stop)
        automaton = self._automaton
        if automaton is None or (not self._held and automaton.opening.search(text) is None):
            return StopResult(text)
        whole, node, root = self._held + text, self._node, automaton.root
        for place, char in enumerate(text, start=len(self._held) + 1):
            node = _step(node, char, root)
            if node.match is not None:
                self._stop, self._held = node.match, ""
                return StopResult(whole[: place if self._include_stop else place - len(node.match)], node.match)
        self._node, shown = node, len(whole) - node.depth
        self._held = whole[shown:]
        return StopResult(whole[:shown])

    def flush(self) -> str:
        """The end of the text: what was held back did not become a stop string."""
        held, self._held = self._held, ""
        return held
