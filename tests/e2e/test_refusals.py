"""`pdserve up` where it cannot start: it says why in one line, and leaves nothing running."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.cluster import run_cli

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / "models" / "pdserve-tiny"


@pytest.fixture
def scaled_model(tmp_path: Path) -> Path:
    """The shipped model with a RoPE scaling that is not built."""
    directory = shutil.copytree(MODEL, tmp_path / "scaled")
    config = json.loads((directory / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 8.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_model_that_would_not_be_exact_is_refused_by_name(tmp_path: Path, scaled_model: Path) -> None:
    state_dir = tmp_path / "state"
    answer = run_cli(state_dir, "up", "--detach", "--port", "0", "--model", str(scaled_model))
    assert answer.returncode == 3
    assert "RoPE of type 'dynamic' is not supported" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert run_cli(state_dir, "status").returncode == 3


def test_a_cluster_without_workers_is_refused(tmp_path: Path) -> None:
    answer = run_cli(tmp_path / "state", "up", "--detach", "--prefill", "0", "--decode", "0")
    assert answer.returncode == 3
    assert "--prefill N and --decode M" in answer.stderr
