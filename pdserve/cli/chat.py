"""Owns `pdserve chat`: one question, or a conversation, streamed over the HTTP API."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from pdserve.cli.access import error_of, get
from pdserve.cli.options import EXIT_OK, Commands, access, command, reaching
from pdserve.cli.sse import events
from pdserve.cli.terminal import Terminal
from pdserve.errors import PdserveError, Unavailable

READ_S = 120.0
HELP = "Ctrl-D or /exit leaves, /clear forgets the conversation."


@dataclass(slots=True)
class Turn:
    """One answer."""

    text: list[str] = field(default_factory=list)
    finish_reason: str = ""
    request_id: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0


def add(commands: Commands) -> None:
    parser = command(commands, "chat", "talk to the model", chat)
    reaching(parser)
    parser.add_argument("text", nargs="*", help="one question; without it, a conversation")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="0 = greedy")
    parser.add_argument("--seed", type=int, default=None, metavar="S")


def chat(options: argparse.Namespace, terminal: Terminal) -> int:
    messages = [{"role": "system", "content": options.system}] if options.system else []
    with access(options).http(READ_S) as http:
        model = get(http, "/v1/models").records("data")[0].text("id")
        settings = _settings(options, model)
        if options.text:
            messages.append({"role": "user", "content": " ".join(options.text)})
            turn = _ask(http, settings, messages, terminal)
            terminal.result(_result(turn, model))
            return EXIT_OK
        return _converse(http, settings, messages, terminal)


def _converse(
    http: httpx.Client, settings: dict[str, object], messages: list[dict[str, str]], terminal: Terminal
) -> int:
    first = list(messages)
    terminal.say(f"{settings['model']}. {HELP}")
    while True:
        terminal.write("> " if sys.stdin.isatty() else "")
        line = sys.stdin.readline()
        if not line or line.strip() in ("/exit", "/quit"):
            return EXIT_OK
        if line.strip() == "/clear":
            messages = list(first)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        try:
            turn = _ask(http, settings, messages, terminal)
        except PdserveError as error:
            messages.pop()
            terminal.error(error.reason, error.message)
            continue
        messages.append({"role": "assistant", "content": "".join(turn.text)})
        terminal.result(_result(turn, str(settings["model"])))


def _settings(options: argparse.Namespace, model: str) -> dict[str, object]:
    settings: dict[str, object] = {"model": model, "max_tokens": options.max_tokens, "stream": True}
    if options.temperature is not None:
        settings["temperature"] = options.temperature
    if options.seed is not None:
        settings["seed"] = options.seed
    return settings


def _ask(
    http: httpx.Client, settings: dict[str, object], messages: Sequence[dict[str, str]], terminal: Terminal
) -> Turn:
    """Streams the answer to people as it comes."""
    turn, began_s = Turn(), time.monotonic()
    body = {**settings, "messages": list(messages)}
    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            turn.request_id = response.headers.get("x-request-id", "")
            if not response.is_success:
                raise error_of(response.status_code, response.read())
            for event in events(response.iter_lines()):
                for choice in event.records("choices"):
                    delta = choice.record("delta")
                    if delta.has("content") and (text := delta.text("content")):
                        turn.ttft_s = turn.ttft_s or time.monotonic() - began_s
                        turn.text.append(text)
                        terminal.write(text)
                    if choice.has("finish_reason"):
                        turn.finish_reason = choice.text("finish_reason")
    except httpx.HTTPError as error:
        raise Unavailable(f"The connection to the cluster was lost ({error}). See: pdserve status") from error
    finally:
        terminal.write("\n")
    turn.total_s = time.monotonic() - began_s
    return turn


def _result(turn: Turn, model: str) -> dict[str, object]:
    return {
        "model": model,
        "text": "".join(turn.text),
        "finish_reason": turn.finish_reason,
        "request_id": turn.request_id,
        "ttft_s": round(turn.ttft_s, 4),
        "total_s": round(turn.total_s, 4),
    }
