"""Owns the commands that look at the KV tiers and change nothing: `pdserve kv stat`, `ls` and `explain`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from pdserve.cli.access import get, post
from pdserve.cli.options import EXIT_FAILED, EXIT_OK, access
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, seconds, size
from pdserve.errors import InvalidRequest

KV_PATH = "/api/v1/kv"
ANSWER_S = 30.0  # a worker is given 10
TIERS = ("device", "host", "disk", "redis")
_PARENT_DIGITS = 12
_STAT_HEADINGS = (
    "WORKER", "TIER", "USED", "OF", "PAGES", "HIT TOKENS", "MISSED", "IN", "OUT", "READ/PAGE", "WRITE/PAGE", "EVICTED",
    "MEAN AGE", "EXPIRED", "DROPPED", "FAILED", "BAD",
)  # fmt: skip


def stat(options: argparse.Namespace, terminal: Terminal) -> int:
    with access(options).http(ANSWER_S) as http:
        answer = get(http, KV_PATH)
    terminal.result(answer.plain())
    workers = answer.records("workers")
    for worker in workers:
        terminal.say(_device(worker))
        if worker.records("tiers"):
            terminal.say(_loads(worker))
    rows = [_tier(worker.text("worker"), tier) for worker in workers for tier in worker.records("tiers")]
    if rows:
        terminal.say()
        terminal.table(_STAT_HEADINGS, rows)
    else:
        terminal.say("No worker has a tier below the device (store.host_bytes is 0, or none has reported yet).")
    return EXIT_OK


def ls(options: argparse.Namespace, terminal: Terminal) -> int:
    query = urlencode({"worker": options.worker, "tier": options.tier, "limit": options.limit})
    with access(options).http(ANSWER_S) as http:
        answer = get(http, f"{KV_PATH}/pages?{query}")
    terminal.result(answer.plain())
    pages = answer.records("pages")
    if pages:
        terminal.table(
            ("KEY", "WORKER", "TIER", "SIZE", "AGE", "READERS", "HELD", "PARENT"), [_page(page) for page in pages]
        )
    else:
        terminal.say("No page lies below the device.")
    return warn_of_silence(answer, terminal)


def explain(options: argparse.Namespace, terminal: Terminal) -> int:
    body = prompt_fields(options)
    if not body:
        raise InvalidRequest("Give a prompt, or --token-ids.")
    with access(options).http(ANSWER_S) as http:
        answer = post(http, f"{KV_PATH}/explain", body)
    terminal.result(answer.plain())
    terminal.say(
        f"{answer.integer('prompt_tokens')} prompt tokens, {answer.integer('keyed_tokens')} in whole units of 16: "
        "no others are kept"
    )
    workers = answer.records("workers")
    names = _columns([worker.numbers("tokens") for worker in workers])
    rows = [
        (
            worker.text("worker"),
            *(f"{worker.numbers('tokens')[name]:.0f}" if name in worker.numbers("tokens") else "-" for name in names),
            str(worker.integer("reusable_tokens")),
        )
        for worker in workers
    ]
    terminal.table(("WORKER", *(name.upper() for name in names), "REUSABLE"), rows)
    return warn_of_silence(answer, terminal)


def prompt_fields(options: argparse.Namespace) -> dict[str, object]:
    """Of a request's body; empty where no prompt was given. Raises InvalidRequest where two were."""
    if options.prompt is not None and options.token_ids is not None:
        raise InvalidRequest("Give the prompt as text or as --token-ids, not both.")
    prompt = options.prompt if options.prompt is not None else options.token_ids
    if prompt is None:
        return {}
    return {"prompt": prompt, **({"cache_salt": options.cache_salt} if options.cache_salt else {})}


def warn_of_silence(answer: Record, terminal: Terminal) -> int:
    """Exit status 1 where a worker did not answer, or could not look at a tier."""
    silent = answer.records("silent")
    for each in silent:
        terminal.line("warn", each.text("worker"), f"no answer: {each.text('message')}")
    return EXIT_FAILED if silent else EXIT_OK


def _columns(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Nearest tier first; those that we do not know last."""
    names = {"device"} | {name for tokens in found for name in tokens}
    return [name for name in TIERS if name in names] + sorted(names.difference(TIERS))


def _device(worker: Record) -> str:
    total, free = worker.integer("device_tokens"), worker.integer("device_free_tokens")
    return (
        f"{worker.text('worker')}: device {total - free} of {total} tokens in use; prefix index "
        f"{worker.integer('device_hit_tokens')} of {worker.integer('device_query_tokens')} tokens hit"
    )


def _loads(worker: Record) -> str:
    loads = worker.record("loads")
    loaded = loads.numbers("loaded_tokens")
    by_tier = ", ".join(f"{name} {count:.0f}" for name, count in sorted(loaded.items()))
    return (
        f"{worker.text('worker')}: tiers looked through for {loads.integer('queried_tokens')} tokens, "
        f"{sum(loaded.values()):.0f} loaded{f' ({by_tier})' if by_tier else ''} in {seconds(loads.number('load_s'))}; "
        f"{loads.integer('late')} loads late, {loads.integer('no_room')} without room, "
        f"{loads.integer('not_worth_it')} not worth it; {loads.integer('offers_skipped')} pages not offered, "
        f"{loads.integer('dropped_on_the_way_down')} dropped on the way down"
    )


def _tier(worker: str, tier: Record) -> tuple[str, ...]:
    capacity, evicted, bad = tier.integer("capacity_bytes"), tier.integer("evicted"), tier.numbers("verify_failures")
    return (
        worker,
        tier.text("tier"),
        size(tier.integer("used_bytes")),
        size(capacity) if capacity else "-",
        str(tier.integer("pages")) if tier.has("pages") else "-",
        str(tier.integer("hit_tokens")),
        str(tier.integer("miss_tokens")),
        size(tier.integer("bytes_in")),
        size(tier.integer("bytes_out")),
        _mean(tier.number("read_s"), tier.integer("read_pages")),
        _mean(tier.number("write_s"), tier.integer("stored")),
        str(evicted),
        seconds(tier.number("evicted_age_s") / evicted) if evicted else "-",
        str(tier.integer("expired")),
        str(tier.integer("dropped")),
        str(tier.integer("failures")),
        ", ".join(f"{count:.0f} {kind}" for kind, count in sorted(bad.items())) or "0",
    )


def _mean(total_s: float, count: int) -> str:
    return seconds(total_s / count) if count else "-"


def _page(page: Record) -> tuple[str, ...]:
    held_s = page.number("held_s")
    return (
        page.text("key"),
        page.text("worker"),
        page.text("tier"),
        size(page.integer("size_bytes")),
        seconds(page.number("age_s")),
        str(page.integer("refs")),
        seconds(held_s) if held_s else "-",
        page.text("parent")[:_PARENT_DIGITS] or "-",
    )
