"""Owns a step's block tables side by side in one array: a line for each, which stays while its table is in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.block_tables import Table

_FIRST_LINES, _FIRST_PAGES = 8, 64


@dataclass(frozen=True, slots=True, eq=False)
class PlacedBlocks:
    """The blocks of ordinal i are `table[lines[i]]`, as many as were placed; what lies behind them is nobody's. On the host."""

    table: np.ndarray  # int32 [lines, pages]
    lines: np.ndarray  # int64 [ordinals]

    def of(self, ordinal: int) -> np.ndarray:
        """int32 [pages], a view."""
        line: np.ndarray = self.table[self.lines[ordinal]]
        return line

    @property
    def starts(self) -> np.ndarray:
        """Of each ordinal in the flat table."""
        starts: np.ndarray = self.lines * self.table.shape[1]
        return starts


class BlockLines:
    """Grows by doubling. Relies on `engine.block_tables`: a table changes only at its end and in the page that is written next."""

    def __init__(self) -> None:
        self._table = np.zeros((_FIRST_LINES, _FIRST_PAGES), dtype=np.int32)
        self._held: dict[Table, tuple[int, int]] = {}  # its line, and how many of its pages lie there at least

    @property
    def pages(self) -> int:
        """Room of a line."""
        return self._table.shape[1]

    def place(self, tables: Sequence[Table], pages: Sequence[int]) -> PlacedBlocks:
        """The first `pages` blocks of each of `tables`; all others lose their lines."""
        self._make_room(len(tables), max(pages))
        held, self._held = self._held, {}
        taken = {held[table][0] for table in tables if table in held}
        free = (line for line in range(len(self._table)) if line not in taken)
        for table, count in zip(tables, pages, strict=True):
            line, known = held[table] if table in held else (next(free), 1)
            begin = min(known, count) - 1  # a copy may have replaced the page that was written last
            self._table[line, begin:count] = np.frombuffer(table.blocks, dtype=np.int32)[begin:count]
            self._held[table] = (line, count)
        lines = np.array([line for line, _ in self._held.values()], dtype=np.int64)
        return PlacedBlocks(self._table, lines)

    def write(self, lines: np.ndarray, pages: np.ndarray, blocks: np.ndarray) -> None:
        """One block of each of `lines`, within its room."""
        self._table[lines, pages] = blocks

    def _make_room(self, lines: int, pages: int) -> None:
        have_lines, have_pages = self._table.shape
        if lines <= have_lines and pages <= have_pages:
            return
        old = self._table
        self._table = np.zeros((_doubled(have_lines, lines), _doubled(have_pages, pages)), dtype=np.int32)
        self._table[:have_lines, :have_pages] = old


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size
