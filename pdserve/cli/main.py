"""Owns the `pdserve` program: its commands, and what becomes of their errors.

Exit status: 0 done, 1 failed, 2 usage or configuration, 3 not ready, 4 a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pdserve.cli import bench, chat, doctor, down, explain, kv, status, top, up, verify, version
from pdserve.cli.options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NOT_READY, EXIT_USAGE
from pdserve.cli.terminal import Terminal
from pdserve.errors import ConfigInvalid, DeadlineExceeded, InvalidRequest, PdserveError, Unavailable

_COMMANDS = (up, down, status, top, chat, verify, bench, explain, kv, doctor, version)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    terminal = Terminal(options.output)
    try:
        code = options.run(options, terminal)
        assert isinstance(code, int)
        return code
    except PdserveError as error:
        terminal.error(error.reason, error.message)
        return exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`pdserve top | head`): nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def exit_code(error: PdserveError) -> int:
    if isinstance(error, ConfigInvalid | InvalidRequest):
        return EXIT_USAGE
    return EXIT_NOT_READY if isinstance(error, Unavailable | DeadlineExceeded) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdserve",
        description="Disaggregated prefill/decode serving of large language models.",
        epilog="Begin with: pdserve up --detach",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
