"""Owns the plots of the documents: docs/*.svg from benchmarks/results. `make plots`."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from benchmarks.report import RESULTS, Result, read_result

DOCS = Path(__file__).resolve().parents[1] / "docs"
_ATTENTION = re.compile(r"attention, prefix (\d+), batch (\d+)")


def shared_prefix(shown: Result, target: Path) -> None:
    """Ratio of attention without to with sharing, over the batch, one line per prefix length."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for item in shown.measurements:
        found = _ATTENTION.fullmatch(item.name)
        if found is not None and item.peer is not None:
            lines.setdefault(int(found[1]), []).append((int(found[2]), item.peer.ratio))
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for prefix, points in sorted(lines.items()):
        batches, ratios = zip(*sorted(points), strict=True)
        axes.plot(batches, ratios, marker="o", label=f"{prefix:,} shared tokens")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 8, 16, 32, 64, 128], labels=["1", "4", "8", "16", "32", "64", "128"])
    axes.set_xlabel("sequences in the batch, each with 128 tokens of its own")
    axes.set_ylabel("times as fast as our kernel without sharing")
    axes.set_title(f"Attention over a shared prefix, {shown.machine.cpu}, {shown.settings['threads']} threads")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "pdserve"  # the same file from the same numbers
    shared_prefix(read_result(RESULTS / "shared_prefix-full.json"), DOCS / "shared_prefix.svg")


if __name__ == "__main__":
    main()
