"""Owns what commands print: text for people, or JSON objects, with progress and errors on stderr. NO_COLOR is honoured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

Form = Literal["text", "json"]
Mark = Literal["ok", "warn", "fail", "info"]

_MARKS: Mapping[Mark, tuple[str, str]] = {
    "ok": ("✓", "32"), "warn": ("!", "33"), "fail": ("✗", "31"), "info": ("·", "2"),
}  # fmt: skip
_ASCII: Mapping[Mark, str] = {"ok": "ok", "warn": "!!", "fail": "XX", "info": "--"}


class Terminal:
    def __init__(self, form: Form, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.form = form
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        self._people = self._out if form == "text" else self._err
        self._colour = self._people.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._unicode = (getattr(self._people, "encoding", None) or "").lower().replace("-", "") == "utf8"

    def say(self, text: str = "") -> None:
        """A result for people; nothing in JSON form, which holds it in its object."""
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Like `say`, without a line's end: streamed text."""
        if self.form == "text":
            self._show(text)

    def line(self, mark: Mark, name: str, text: str) -> None:
        """One marked line of a result: a check."""
        if self.form == "text":
            self.progress(mark, name, text)

    def progress(self, mark: Mark, name: str, text: str) -> None:
        """One marked line about work under way: on stderr where stdout carries JSON."""
        symbol, colour = _MARKS[mark]
        shown = self.paint(symbol, colour) if self._unicode else _ASCII[mark]
        self._show(f"  {shown} {name:<12} {text}\n")

    def ask(self, question: str) -> None:
        """On stderr, whatever the form."""
        self._err.write(self._plain(question))
        self._err.flush()

    def result(self, value: Mapping[str, object]) -> None:
        """The one JSON object of a command; nothing in text form."""
        if self.form == "json":
            self._out.write(json.dumps(value) + "\n")
            self._out.flush()

    def error(self, reason: str, message: str) -> None:
        if self.form == "json":
            self.result({"error": {"code": reason, "message": message}})
        self._err.write(f"pdserve: {self._plain(message)}\n")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
        for row in (headings, *rows):
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text

    @property
    def interactive(self) -> bool:
        return self._people.isatty()

    def _show(self, text: str) -> None:
        self._people.write(self._plain(text))
        self._people.flush()

    def _plain(self, text: str) -> str:
        if self._unicode:
            return text
        swapped = text.replace("→", "->").replace("…", "...")
        return swapped.encode("ascii", "replace").decode()


def seconds(value_s: float) -> str:
    """Readable duration: 0.8 ms, 41 ms, 3.2 s."""
    if value_s < 0.0095:
        return f"{value_s * 1000:.1f} ms"
    return f"{value_s * 1000:.0f} ms" if value_s < 0.9995 else f"{value_s:.1f} s"


def size(count: float) -> str:
    """Readable size of `count` bytes, decimal."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
