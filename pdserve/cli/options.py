"""Owns the flags that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pdserve.cli.access import Access, api_key_from_environment, local_access
from pdserve.cli.cluster_state import default_state_dir
from pdserve.cli.terminal import Terminal
from pdserve.errors import InvalidRequest

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_READY = 3
EXIT_CHECK_FAILED = 4
EXIT_INTERRUPTED = 130


class Commands(Protocol):
    """What argparse's sub-parsers offer; its own type is private."""

    def add_parser(self, name: str, *, help: str, description: str) -> argparse.ArgumentParser: ...


Run = Callable[[argparse.Namespace, Terminal], int]


def command(commands: Commands, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    """A sub-command with the flags that all have."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the result")
    parser.add_argument(
        "--state-dir", type=Path, default=default_state_dir(), metavar="DIR",
        help="state directory of the local cluster (default: .pdserve, or PDSERVE_STATE_DIR)",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def reaching(parser: argparse.ArgumentParser) -> None:
    """Flags of commands that work on remote clusters too."""
    parser.add_argument("--url", default="", metavar="URL", help="HTTP API of a cluster elsewhere")
    parser.add_argument("--grpc", default="", metavar="HOST:PORT", help="gRPC API of a cluster elsewhere")
    parser.add_argument("--ca", type=Path, default=None, metavar="FILE", help="PEM certificate to trust with --url")


def access(options: argparse.Namespace) -> Access:
    """Raises Unavailable where no cluster is named and none runs here, InvalidRequest where half of one is named."""
    if options.grpc and not options.url:
        raise InvalidRequest("--grpc needs --url too: the HTTP API of the same cluster.")
    if options.url and not options.url.startswith(("http://", "https://")):
        raise InvalidRequest(f"--url {options.url} must begin with http:// or https://.")
    if options.url:
        return Access(options.url, options.grpc, api_key_from_environment(), options.ca)
    return local_access(options.state_dir)
