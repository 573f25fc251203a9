"""Owns `pdserve explain`: where a request went and why, with every candidate's terms, and its timeline."""

from __future__ import annotations

import argparse

from pdserve.cli.access import get, get_rows
from pdserve.cli.options import EXIT_OK, Commands, access, command, reaching
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, seconds, size
from pdserve.errors import NotFound

LATEST = "latest"


def add(commands: Commands) -> None:
    parser = command(commands, "explain", "tell where a request went, and why", explain)
    reaching(parser)
    parser.add_argument("request", nargs="?", default=LATEST, help="request id (header x-request-id), or: latest")


def explain(options: argparse.Namespace, terminal: Terminal) -> int:
    with access(options).http(timeout_s=10.0) as http:
        request_id = options.request
        if request_id == LATEST:
            rows = get_rows(http, "/api/v1/requests?limit=1")
            if not rows:
                raise NotFound("No request was served yet. Send one: pdserve chat 'What does json.loads do?'")
            request_id = rows[0].text("request_id")
        try:
            timeline = get(http, f"/api/v1/requests/{request_id}")
        except NotFound as error:
            raise NotFound(f"{error.message} The latest one: pdserve explain") from error
    terminal.result(timeline.plain())
    _summary(timeline, terminal)
    for decision in timeline.records("decisions"):
        _decision(decision, terminal)
    _attempts(timeline, terminal)
    _stages(timeline, terminal)
    return EXIT_OK


def _summary(timeline: Record, terminal: Terminal) -> None:
    summary = timeline.record("summary")
    count = timeline.integer("blended_tokens")
    blended = f", {count} blended from chunks" if count else ""
    ttft = f", first token after {seconds(summary.number('ttft_s'))}" if summary.has("ttft_s") else ""
    terminal.say(
        f"{timeline.text('request_id')}: {summary.text('state')}, {summary.integer('prompt_tokens')} prompt tokens "
        f"({timeline.integer('cached_tokens')} cached{blended}), {summary.integer('output_tokens')} output tokens, "
        f"{summary.integer('choices')} choices{ttft}, {seconds(summary.number('total_s'))} in all"
    )
    if timeline.has("ratio_choice"):
        terminal.say(_ratio_choice(timeline.record("ratio_choice")))
    if summary.text("error"):
        terminal.say(f"failed: {summary.text('error')}: {summary.text('error_message')}")


def _ratio_choice(choice: Record) -> str:
    speeds = "nothing was measured yet"
    if choice.number("whole_s"):
        loading, blending, whole = (seconds(choice.number(name)) for name in ("load_s", "blend_s", "whole_s"))
        speeds = f"{loading} to load, {blending} to blend, {whole} to compute the whole prompt"
    if choice.has("ratio"):
        return f"blended at ratio {choice.number('ratio'):g}, by measured speeds: {speeds}"
    return f"computed whole, by measured speeds: {speeds}"


def _decision(decision: Record, terminal: Terminal) -> None:
    terminal.say()
    picked = _pair(decision.record("picked")) if decision.has("picked") else "nobody"
    terminal.say(
        f"decision for attempt {decision.integer('attempt')} after {seconds(decision.number('at_s'))}: {picked} "
        f"({decision.text('reason')}; policy {decision.text('policy')})"
    )
    candidates = decision.records("candidates")
    scored = [one for one in candidates if one.has("score")]
    terms = sorted({name for one in scored for name in one.numbers("terms")})
    if scored:
        rows = [
            (
                _pair(one),
                f"{one.number('score'):.6g}",
                *(f"{one.numbers('terms').get(name, 0.0):.6g}" for name in terms),
                *_held(one),
            )
            for one in scored
        ]
        terminal.table(
            ("CANDIDATE", "SCORE", *(name.upper() for name in terms), "ON DEVICE", "IN TIERS", "AT A PEER"), rows
        )
        if decision.text("reused") == "chunks":
            terminal.say(
                "the tokens that a candidate holds are of the prompt's chunks, which are blended: "
                f"work as for {decision.integer('recomputed_tokens')} of those is done anew wherever they lie"
            )
    for one in candidates:
        if not one.has("score"):
            terminal.say(f"refused {_pair(one)}: {one.text('refusal')} ({one.text('message')})")
    if decision.integer("candidates_left_out"):
        terminal.say(f"{decision.integer('candidates_left_out')} more candidates are not listed")


def _held(candidate: Record) -> tuple[str, str, str]:
    """Tokens that need not be computed there."""
    pulled = candidate.integer("pulled_tokens")
    peer = f"{pulled} at {candidate.text('peer')}" if pulled else "0"
    return str(candidate.integer("device_tokens")), str(candidate.integer("stored_tokens")), peer


def _pair(one: Record) -> str:
    prefill, decode = one.text("prefill_worker"), one.text("decode_worker")
    if one.text("kind") == "split":
        over = f" over {one.text('transport')}" if one.text("transport") else ""
        return f"{prefill or 'any'} → {decode or 'any'}{over}"
    return f"{decode or prefill} ({one.text('kind').replace('_', ' ')})"


def _attempts(timeline: Record, terminal: Terminal) -> None:
    rows = [
        (
            str(one.integer("attempt")), _pair(one), one.text("outcome"), one.text("reason") or "-",
            seconds(one.number("queue_s")), seconds(one.number("prefill_s")), size(one.integer("kv_bytes")),
            seconds(one.number("transfer_s")), seconds(one.number("exposed_s")),
        )
        for one in timeline.records("attempts")
    ]  # fmt: skip
    if rows:
        terminal.say()
        terminal.table(("ATTEMPT", "ROUTE", "OUTCOME", "REASON", "QUEUE", "PREFILL", "KV", "TRANSFER", "EXPOSED"), rows)


def _stages(timeline: Record, terminal: Terminal) -> None:
    rows = [
        (
            f"+{seconds(one.number('begins_s'))}", one.text("name"), str(one.integer("attempt")), one.text("worker") or "-",
            seconds(one.number("seconds")) if one.has("seconds") else "lasts",
        )
        for one in timeline.records("stages")
    ]  # fmt: skip
    if rows:
        terminal.say()
        terminal.table(("BEGINS", "STAGE", "ATTEMPT", "WORKER", "SECONDS"), rows)
