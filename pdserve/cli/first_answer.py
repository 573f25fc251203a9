"""Owns the real request that `up` sends, and the sentence that tells its path."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from pdserve.cli.access import Access, get, post
from pdserve.cli.record import Record
from pdserve.cli.terminal import seconds, size
from pdserve.errors import NotFound

PROMPT = 'def read_lines(path):\n    """'
MAX_TOKENS = 48
TEMPERATURE, SEED = 0.5, 7  # greedy text of a small model loops
DEADLINE_S = 60.0
TIMELINE_DEADLINE_S = 3.0


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    request_id: str
    model: str
    text: str
    tokens: int
    total_s: float
    path: str


def first_answer(access: Access) -> FirstAnswer:
    """Raises what the API answers."""
    request_id = f"up-{secrets.token_hex(6)}"
    with access.http(DEADLINE_S) as http:
        model = get(http, "/v1/models").records("data")[0].text("id")
        began_s = time.monotonic()
        body: dict[str, object] = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
            "temperature": TEMPERATURE,
            "seed": SEED,
        }
        answer = post(http, "/v1/completions", body, request_id)
        total_s = time.monotonic() - began_s
        timeline = _ended_timeline(access, request_id)
    tokens = answer.record("usage").integer("completion_tokens")
    text = answer.records("choices")[0].text("text")
    return FirstAnswer(request_id, model, text, tokens, total_s, path_of(timeline))


def _ended_timeline(access: Access, request_id: str) -> Record:
    """Of a request that has been answered; its last reports may still be on their way."""
    end = time.monotonic() + TIMELINE_DEADLINE_S
    with access.http(DEADLINE_S) as http:
        while True:
            timeline = get(http, f"/api/v1/requests/{request_id}")
            attempts = timeline.records("attempts")
            split = attempts and attempts[-1].text("kind") == "split"
            if not split or attempts[-1].integer("kv_bytes") > 0 or time.monotonic() > end:
                return timeline
            time.sleep(0.05)


def path_of(timeline: Record) -> str:
    """For example: prefill p0 41 ms → 1.2 MB KV 0.8 ms over ucx → decode d0 61 tok/s."""
    attempts = timeline.records("attempts")
    if not attempts:
        raise NotFound("The request was never dispatched: pdserve status")
    last = attempts[-1]
    decode = f"decode {last.text('decode_worker')}{_rate(timeline)}"
    if last.text("kind") != "split":
        return f"prefill and {decode} on one worker, nothing handed over"
    prefill = f"prefill {last.text('prefill_worker')} {seconds(last.number('prefill_s'))}"
    moved = f"{size(last.integer('kv_bytes'))} KV {seconds(last.number('transfer_s'))} over {last.text('transport')}"
    return f"{prefill} → {moved} → {decode}"


def _rate(timeline: Record) -> str:
    """Tokens per second after the first one."""
    summary = timeline.record("summary")
    tokens = summary.integer("output_tokens") - summary.integer("choices")
    if not summary.has("ttft_s") or tokens < 1:
        return ""
    decode_s = summary.number("total_s") - summary.number("ttft_s")
    return f" {tokens / decode_s:.0f} tok/s" if decode_s > 0 else ""
