"""Owns which pdserve is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The string "unknown" where it runs from sources that nothing installed."""
    try:
        return version("pdserve")
    except PackageNotFoundError:
        return "unknown"
