"""Owns the commands that change or check what the KV tiers hold: `pdserve kv pin`, `flush` and `verify`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field

import httpx

from pdserve.cli.access import post
from pdserve.cli.kv_looks import ANSWER_S, KV_PATH, prompt_fields
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_FAILED, EXIT_OK, access
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, size
from pdserve.errors import Cancelled, InvalidRequest, NotFound

_FLUSH_STEPS_MOST = 1000
_STEP_S = 5.0  # of a check: one answer


@dataclass(slots=True)
class TierSum:
    """Of one tier of one worker, over all steps."""

    worker: str
    tier: str
    pages: int = 0
    bad: int = 0
    checked_bytes: int = 0
    bad_keys: list[str] = field(default_factory=list)
    cut: bool = False  # there is more to do
    failure: str = ""

    def add(self, outcome: Record) -> None:
        self.pages += outcome.integer("pages")
        self.bad += outcome.integer("bad")
        self.checked_bytes += outcome.integer("checked_bytes")
        self.bad_keys += outcome.texts("bad_keys")
        self.cut = outcome.truth("cut")
        self.failure = outcome.text("failure")


@dataclass(slots=True)
class Sums:
    """Of one command, over all its steps."""

    tiers: dict[tuple[str, str], TierSum] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)  # worker -> why it did not answer

    def add(self, answer: Record) -> list[Record]:
        """Returns the outcomes that were cut."""
        cut: list[Record] = []
        for outcome in answer.records("outcomes"):
            name = (outcome.text("worker"), outcome.text("tier"))
            self.tiers.setdefault(name, TierSum(*name)).add(outcome)
            if outcome.truth("cut") and not outcome.text("failure"):
                cut.append(outcome)
        self.silent |= {each.text("worker"): each.text("message") for each in answer.records("silent")}
        return cut

    @property
    def pages(self) -> int:
        return sum(tier.pages for tier in self.tiers.values())

    @property
    def bad(self) -> int:
        return sum(tier.bad for tier in self.tiers.values())

    @property
    def complete(self) -> bool:
        return not self.silent and not any(tier.cut or tier.failure for tier in self.tiers.values())

    def plain(self) -> dict[str, object]:
        return {
            "outcomes": [asdict(tier) for tier in self.tiers.values()],
            "silent": [{"worker": worker, "message": message} for worker, message in self.silent.items()],
            "pages": self.pages,
            "bad": self.bad,
            "complete": self.complete,
        }

    def troubles(self, terminal: Terminal) -> int:
        """Exit status 1 where a worker or a tier did not do it."""
        for worker, message in self.silent.items():
            terminal.line("warn", worker, f"did not answer: {message}")
        for tier in self.tiers.values():
            if tier.failure:
                terminal.line("fail", tier.worker, f"{tier.tier}: {tier.failure}")
        failed = self.silent or any(tier.failure for tier in self.tiers.values())
        return EXIT_FAILED if failed else EXIT_OK


def pin(options: argparse.Namespace, terminal: Terminal) -> int:
    body = _selection(options)
    if "keys" not in body and "prompt" not in body:
        raise InvalidRequest("Name the pages to pin: keys, --prompt or --token-ids. `pdserve kv ls` shows keys.")
    sums = Sums()
    with access(options).http(ANSWER_S) as http:
        sums.add(post(http, f"{KV_PATH}/pin", {**body, "hold_s": options.hold_s}))
    if not sums.pages and sums.complete:
        raise NotFound(
            "None of these pages lies in a tier where it can be pinned. See: pdserve kv explain, pdserve kv ls"
        )
    terminal.result(sums.plain())
    held = f"held for {options.hold_s:g} s" if options.hold_s else "let go"
    for tier in sums.tiers.values():
        terminal.say(f"{tier.worker}: {tier.pages} pages in {tier.tier} {held}")
    return sums.troubles(terminal)


def flush(options: argparse.Namespace, terminal: Terminal) -> int:
    body = _selection(options)
    if not options.yes:
        _ask(_meant(options), terminal)
    sums = Sums()
    with access(options).http(ANSWER_S) as http:
        for _ in range(_FLUSH_STEPS_MOST):
            if not sums.add(post(http, f"{KV_PATH}/flush", body)):
                break  # what was cut goes on, with fewer pages each time
    terminal.result(sums.plain())
    for tier in sums.tiers.values():
        what = "prefix cache cleared" if tier.tier == "device" else f"{tier.pages} pages dropped from {tier.tier}"
        terminal.say(f"{tier.worker}: {what}")
    if not sums.tiers:
        terminal.say("No worker has a tier below the device: there is nothing to drop.")
    return sums.troubles(terminal)


def verify(options: argparse.Namespace, terminal: Terminal) -> int:
    """Exit status 4 where a page was bad, 1 where not everything could be asked."""
    body = {**_selection(options), "deadline_s": _STEP_S}
    if options.max_bytes is not None:
        body["max_bytes"] = options.max_bytes
    sums, ends_s = Sums(), time.monotonic() + options.seconds
    with access(options).http(ANSWER_S) as http:
        _verify_all(http, body, sums, ends_s)
    terminal.result(sums.plain())
    for tier in sums.tiers.values():
        more = f"; given up after {options.seconds:g} s, there are more" if tier.cut else ""
        terminal.line(
            "fail" if tier.bad else "ok",
            tier.worker,
            f"{tier.tier}: {tier.pages} pages good, {tier.bad} bad, {size(tier.checked_bytes)} compared{more}",
        )
        for key in tier.bad_keys:
            terminal.say(f"      {key}")
    if not sums.tiers:
        terminal.say("No worker has a tier below the device: there is nothing to compare.")
    if sums.bad:
        terminal.say("Bad pages were dropped: what they held is computed again when it is needed.")
    code = sums.troubles(terminal)
    return EXIT_CHECK_FAILED if sums.bad else code


def _verify_all(http: httpx.Client, body: dict[str, object], sums: Sums, ends_s: float) -> None:
    """Step by step: what was cut is gone on with, tier by tier of worker by worker."""
    cut = sums.add(post(http, f"{KV_PATH}/verify", body))
    while cut and time.monotonic() < ends_s:
        outcome = cut.pop(0)
        place = {"worker": outcome.text("worker"), "tier": outcome.text("tier"), "after": outcome.text("last_key")}
        cut += sums.add(post(http, f"{KV_PATH}/verify", {**body, **place}))


def _selection(options: argparse.Namespace) -> dict[str, object]:
    fields: dict[str, object] = {"worker": options.worker, "tier": options.tier, "keys": options.keys}
    return {name: value for name, value in fields.items() if value} | prompt_fields(options)


def _meant(options: argparse.Namespace) -> str:
    """What a flush would drop, in words."""
    named = options.keys or options.prompt is not None or options.token_ids is not None
    where = options.tier or ("all tiers" if named else "all tiers and the device's prefix cache")
    return f"{'the named pages' if named else 'everything'} from {where} of {options.worker or 'all workers'}"


def _ask(meant: str, terminal: Terminal) -> None:
    """Raises InvalidRequest where nobody can be asked, Cancelled where the answer is no."""
    if not sys.stdin.isatty():
        raise InvalidRequest(f"This drops {meant}. Nobody can be asked here: add --yes.")
    terminal.ask(f"Drop {meant}? [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Cancelled("Nothing was dropped.")
