"""Owns how a configured model becomes a directory: a local path, or a hub id, fetched by huggingface_hub where that is installed.
`python -m service_kit.hub_model OWNER/NAME` prints the directory.

Safetensors, configurations and tokenizer files only: no pickles, no code.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from pdserve.errors import ConfigInvalid

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Hub(Protocol):
    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str: ...


def model_directory(path_or_id: str) -> Path:
    """The local directory of `path_or_id`. Raises ConfigInvalid if it is neither a directory nor an available hub id."""
    path = Path(path_or_id)
    return path if path.is_dir() else Path(fetch(path_or_id))


def fetch(hub_id: str) -> str:
    """The local directory of `hub_id`, downloaded where it is not there yet. Raises ConfigInvalid."""
    if not _HUB_ID.fullmatch(hub_id):
        raise ConfigInvalid(f"model.path = {hub_id}: is neither a directory nor a hub id (owner/name).")
    try:
        hub = cast(_Hub, importlib.import_module("huggingface_hub"))
    except ImportError:
        raise ConfigInvalid(
            f"model.path = {hub_id}: is no directory, and huggingface_hub is not installed to fetch it. "
            "Run `pip install huggingface_hub`, or download the model and give its directory."
        ) from None
    try:
        return hub.snapshot_download(hub_id, allow_patterns=_PATTERNS)
    except Exception as error:  # the hub raises some thirty classes; all of them mean that the model cannot be had
        raise ConfigInvalid(f"model.path = {hub_id}: could not be fetched from the hub: {error}") from error


def main(arguments: Sequence[str]) -> int:
    try:
        sys.stdout.write(fetch(arguments[0]) + "\n")
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
