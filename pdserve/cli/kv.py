"""Owns `pdserve kv`: its commands, their flags, and which pages these name."""

from __future__ import annotations

import argparse
import re
import sys

from pdserve.cli.kv_looks import explain, ls, stat
from pdserve.cli.kv_steering import flush, pin, verify
from pdserve.cli.options import Commands, Run, command, reaching

_HOLD_S = 3600.0
_VERIFY_S = 60.0
_LISTED = 100


def add(commands: Commands) -> None:
    summary = "see and steer the KV tiers: device, host, disk, redis"
    group = commands.add_parser("kv", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parts = group.add_subparsers(required=True, metavar="COMMAND")
    _add_looks(parts)
    _add_steering(parts)


def _add_looks(parts: Commands) -> None:
    _command(parts, "stat", "show every tier of every worker: how full, how often hit, what went wrong", stat)
    listing = _command(parts, "ls", "list the newest pages of each tier below the device", ls)
    _place(listing)
    listing.add_argument(
        "--limit",
        type=_positive,
        default=_LISTED,
        metavar="N",
        help=f"of each tier of each worker (default: {_LISTED})",
    )
    explaining = _command(parts, "explain", "show where a prompt's KV lies, on every worker, by tier", explain)
    explaining.add_argument(
        "prompt", nargs="?", default=None, type=_text, help="a completion's prompt; - = standard input"
    )
    _token_ids(explaining)


def _add_steering(parts: Commands) -> None:
    pinning = _command(parts, "pin", "keep pages from eviction and expiry for a time", pin)
    _pages(pinning)
    pinning.add_argument(
        "--for", dest="hold_s", type=float, default=_HOLD_S, metavar="SECONDS", help="default: 3600; 0 lets go of them"
    )
    flushing = _command(parts, "flush", "drop pages: those named, or all of a tier, or everything", flush)
    _pages(flushing)
    flushing.add_argument("--yes", action="store_true", help="do not ask")
    verifying = _command(parts, "verify", "compare pages with what was stored; exit status 4 where one is bad", verify)
    _pages(verifying)
    verifying.add_argument(
        "--seconds", type=float, default=_VERIFY_S, metavar="S", help="give up the rest after so long (default: 60)"
    )
    verifying.add_argument("--max-bytes", type=_positive, default=None, metavar="N", help="in each step of each tier")


def _command(parts: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    parser = command(parts, name, summary, run)
    reaching(parser)
    return parser


def _place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker", default="", metavar="ID", help="of this worker alone")
    parser.add_argument("--tier", default="", metavar="TIER", help="in this tier alone: host, disk, redis")


def _pages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("keys", nargs="*", type=_key, metavar="KEY", help="pages, as `pdserve kv ls` shows them")
    parser.add_argument(
        "--prompt", default=None, type=_text, metavar="TEXT", help="the pages of this prompt; - = standard input"
    )
    _token_ids(parser)
    _place(parser)


def _token_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-ids", default=None, type=_ids, metavar="1,2,3", help="the prompt as token ids, for instance a chat's"
    )
    parser.add_argument("--cache-salt", default="", metavar="SALT", help="that the prompt is sent with")


def _key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no key: keys have 64 hexadecimal digits, see pdserve kv ls")
    return text.lower()


def _ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError("token ids are whole numbers with commas between them: 1,2,3")
    return [int(part) for part in parts]


def _text(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no positive number")
    return int(text)
