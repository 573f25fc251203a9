"""Owns the plots of the documents: docs/*.svg from benchmarks/results. `make plots`."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.report import RESULTS, Result, read_result

DOCS = Path(__file__).resolve().parents[1] / "docs"
_REPLAY = re.compile(r"(.+): (\d+) blocks, (.+), (hits|compute saved)")
_TIER_ROW = re.compile(r"(\w+), (.+): (tokens hit, (device|host|disk)|tokens computed|TTFT, mean)")
_BELADY = "Belady (knows the future)"
_RIGHT = re.compile(r"right, (.+), ratio ([\d.]+)")
_SERVED = re.compile(r"TTFT of (\d+) tokens in chunks, KV from (.+)")
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


def cache_replay(shown: Result, target: Path) -> None:
    """Hits and compute saved over the capacity, one line per policy, one row per trace."""
    hits: dict[str, dict[str, list[tuple[int, float]]]] = {}
    saved: dict[str, dict[str, list[tuple[int, float]]]] = {}
    limits = {item.name: item.figure.median for item in shown.measurements}
    for item in shown.measurements:
        found = _REPLAY.fullmatch(item.name)
        if found is None or item.peer is None:
            continue
        trace, capacity, policy = found[1], int(found[2]), found[3]
        kept, value = (hits, item.figure.median) if found[4] == "hits" else (saved, item.figure.median / 3600)
        kept.setdefault(trace, {}).setdefault(policy, []).append((capacity, value))
        if item.peer.name == "Belady":
            kept[trace].setdefault(_BELADY, []).append((capacity, item.peer.figure.median))
    figure, rows = pyplot.subplots(len(hits), 2, figsize=(10, 4.2 * len(hits)), squeeze=False)
    for trace, (left, right) in zip(hits, rows, strict=True):
        _lines(left, hits[trace], limits[f"{trace}: no limit, hits"])
        left.set_ylabel("hits, % of blocks")
        left.set_title(f"Mooncake {trace}: blocks found")
        _lines(right, saved[trace], limits[f"{trace}: no limit, compute saved"] / 3600)
        right.set_ylabel("prefill saved, hours")
        right.set_title(f"Mooncake {trace}: compute saved")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def blend(accuracy: Result, served: Result, target: Path) -> None:
    """Left: right answers over the share computed anew, a line per recipe. Right: time to the first token over the prompt."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    lines: dict[str, list[tuple[float, float]]] = {}
    for item in accuracy.measurements:
        if found := _RIGHT.fullmatch(item.name):
            lines.setdefault(found[1], []).append((float(found[2]), item.figure.median))
    whole = next(item.figure.median for item in accuracy.measurements if item.name == "right, whole prefill")
    naive = next(item.figure.median for item in accuracy.measurements if item.name == "right, naive reuse")
    for name, points in lines.items():
        ratios, right_answers = zip(*sorted(points), strict=True)
        left.plot(ratios, right_answers, marker="o", label=name)
    left.axhline(whole, color="grey", linewidth=0.8, label="whole prefill")
    left.axhline(naive, color="grey", linewidth=0.8, linestyle=":", label="naive reuse")
    left.set_xlabel("share of the chunks' tokens computed anew")
    left.set_ylabel("right answers, %")
    left.set_title("Questions whose answer needs two chunks")
    left.legend(fontsize="small")
    times: dict[str, list[tuple[int, float]]] = {}
    for item in served.measurements:
        if (found := _SERVED.fullmatch(item.name)) and item.peer is not None:
            times.setdefault(f"KV from {found[2]}", []).append((int(found[1]), item.figure.median))
            times.setdefault(item.peer.name, []).append((int(found[1]), item.peer.figure.median))
    for name, line in times.items():
        tokens, seconds = zip(*sorted(set(line)), strict=True)
        right.plot(tokens, seconds, marker="o", label=name)
    right.set_xlabel(f"tokens of the prompt, in chunks of {served.settings['chunk_tokens']}")
    right.set_ylabel("time to the first token, s")
    right.set_ylim(bottom=0)
    right.set_title(f"Through the whole stack, ratio {served.settings['ratio']}")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def tier_replay(shown: Result, target: Path) -> None:
    """Left: where the tokens of all prompts came from, a bar per capacity and policy. Right: mean time to the first token."""
    parts: dict[str, dict[str, float]] = {}
    times: dict[str, tuple[float, float]] = {}
    for item in shown.measurements:
        if (found := _TIER_ROW.fullmatch(item.name)) is None:
            continue
        bar = f"{found[2]}\n{found[1]}"
        if item.peer is not None:
            times[bar] = (item.figure.median, item.peer.figure.median)
        else:
            parts.setdefault(found[4] or "computed", {})[bar] = item.figure.median / 1000
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    below = dict.fromkeys(times, 0.0)
    for name, values in parts.items():
        left.bar(list(values), list(values.values()), bottom=[below[bar] for bar in values], label=name)
        below = {bar: below[bar] + values[bar] for bar in values}
    left.set_ylabel("tokens of prompts, thousands")
    left.set_title("Where their KV came from")
    left.set_ylim(top=1.15 * max(below.values()))
    left.legend(fontsize="small", ncols=len(parts), loc="upper center")
    right.bar(list(times), [ours for ours, _ in times.values()], label="with tiers")
    right.scatter(list(times), [computed for _, computed in times.values()], color="grey", label="computed", zorder=2)
    right.set_ylabel("mean time to the first token, s")
    right.set_title("Against computing everything, in the same round")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def _lines(axes: Axes, lines: dict[str, list[tuple[int, float]]], limit: float) -> None:
    for name, points in sorted(lines.items(), key=lambda line: line[0] == _BELADY):  # a policy has one colour in both
        capacities, values = zip(*sorted(set(points)), strict=True)
        axes.plot(capacities, values, marker="o", label=name, linestyle="--" if name == _BELADY else "-")
    axes.axhline(limit, color="grey", linewidth=0.8, label="no limit")
    axes.set_xscale("log")
    axes.set_xticks([1_000, 5_000, 10_000, 30_000], labels=["1k", "5k", "10k", "30k"])
    axes.set_xlabel("capacity, blocks of 512 tokens")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "pdserve"  # the same file from the same numbers
    shared_prefix(read_result(RESULTS / "shared_prefix-full.json"), DOCS / "shared_prefix.svg")
    cache_replay(read_result(RESULTS / "cache_replay-full.json"), DOCS / "cache_replay.svg")
    tier_replay(read_result(RESULTS / "tier_replay-full.json"), DOCS / "tier_replay.svg")
    accuracy, served = (read_result(RESULTS / f"{name}-full.json") for name in ("blend_accuracy", "blend_served"))
    blend(accuracy, served, DOCS / "blend.svg")


if __name__ == "__main__":
    main()
