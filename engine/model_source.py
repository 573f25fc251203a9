"""Owns how a configured model becomes a directory: a local path, or a hub id fetched by huggingface_hub where that is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

from pdserve.errors import ConfigInvalid

_PATTERNS = ["*.safetensors", "*.json"]  # never pickles, never code


class _Hub(Protocol):
    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str: ...


def model_directory(path_or_id: str) -> Path:
    """The local directory of `path_or_id`. Raises ConfigInvalid if it is neither a directory nor an available hub id."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    parts = path_or_id.split("/")
    if len(parts) != 2 or not all(parts) or path.is_absolute() or parts[0] in (".", "..", "~"):
        raise ConfigInvalid(f"model.path: {path_or_id!r} is neither a directory nor a hub id (owner/name).")
    return Path(_download(path_or_id))


def _download(repo_id: str) -> str:
    try:
        hub = cast(_Hub, importlib.import_module("huggingface_hub"))
    except ImportError:
        raise ConfigInvalid(
            f"model.path: {repo_id!r} is no directory, and huggingface_hub is not installed to fetch it. "
            "Install it, or download the model and give its directory."
        ) from None
    try:
        return hub.snapshot_download(repo_id, allow_patterns=_PATTERNS)
    except Exception as error:  # the hub raises some thirty classes; all of them mean that the model cannot be had
        raise ConfigInvalid(f"model.path: {repo_id!r} could not be fetched from the hub: {error}") from error
