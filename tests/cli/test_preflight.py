"""What `pdserve up` and `doctor` check before a cluster starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.cli.preflight import Check, preflight
from pdserve.cli.servers import read_config


def check_of(name: str, state_dir: Path, *sets: str) -> Check:
    checks = preflight(read_config(None, [f"state_dir={state_dir}", *sets]))
    return next(check for check in checks if check.name == name)


def test_memory_that_the_engines_leave_alone_is_not_counted_as_free(tmp_path: Path) -> None:
    """A pool sized from free memory keeps the reserve; one of a given size does not."""
    sets = ("engine.memory_reserve=0.999",)
    all_reserved = check_of("memory", tmp_path, *sets)
    assert all_reserved.mark == "warn"
    assert "0 B are free" in all_reserved.text
    assert "0 B are free" not in check_of("memory", tmp_path, *sets, "engine.kv_bytes=1000000").text


@pytest.mark.parametrize("transport", ["ucx", "nixl"])
def test_a_transport_whose_library_is_missing_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr("pdserve.cli.preflight.find_spec", lambda name: None)
    check = check_of("transport", tmp_path, f"transfer.transport={transport}")
    assert (check.mark, transport in check.text) == ("fail", True)
    assert "pip install" in check.remedy
