"""The command line without a cluster: exit codes, texts that name the next command, JSON that is one object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PDSERVE = str(Path(sys.executable).parent / "pdserve")
COMMANDS = ("up", "down", "status", "top", "chat", "verify", "bench", "explain", "doctor", "version")


def run(*arguments: str, state_dir: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    place = ["--state-dir", str(state_dir)] if state_dir is not None else []
    command = [PDSERVE, *arguments[:1], *place, *arguments[1:]]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    answer = run(command, "--help")
    assert answer.returncode == 0
    assert "-o {text,json}" in answer.stdout


@pytest.mark.parametrize("arguments", [("frob",), ("up", "--prefill", "many"), ("status", "-o", "xml"), ()])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert "usage" in answer.stderr


@pytest.mark.parametrize("command", ["status", "top", "verify", "bench", "explain", "chat"])
def test_without_a_cluster_the_exit_status_is_3_and_the_text_names_the_next_command(
    command: str, tmp_path: Path
) -> None:
    answer = run(command, state_dir=tmp_path)
    assert answer.returncode == 3
    assert "pdserve up" in answer.stderr


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    assert run("down", state_dir=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("engine.foo=1", "engine.foo: unknown key"),
        ("engine.kv_bytes=abc", "engine.kv_bytes"),
        ("engine.block_tokens=17", "engine.block_tokens"),
        ("controller.host=0.0.0.0", "PDSERVE_API_KEYS"),
        ("nothing", "section.name=value"),
    ],
)
def test_a_bad_setting_refuses_to_start_with_its_path_and_the_reason(setting: str, told: str, tmp_path: Path) -> None:
    answer = run("up", "--detach", "--set", setting, state_dir=tmp_path)
    assert answer.returncode == 2
    assert told in answer.stderr
    assert not (tmp_path / "cluster.json").exists()


def test_a_bad_key_in_the_configuration_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("engine:\n  kv_byte: 5\n")
    answer = run("up", "--detach", "--config", str(file), state_dir=tmp_path)
    assert answer.returncode == 2
    assert "engine.kv_byte" in answer.stderr


def test_a_model_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    answer = run("up", "--detach", "--model", str(tmp_path), state_dir=tmp_path / "state")
    assert answer.returncode == 3
    assert "has no config.json" in answer.stderr


def test_json_goes_to_stdout_alone_and_is_one_object(tmp_path: Path) -> None:
    answer = run("version", "-o", "json")
    assert json.loads(answer.stdout)["client"]
    checks = run("doctor", "-o", "json", state_dir=tmp_path)
    assert isinstance(json.loads(checks.stdout), dict)


def test_no_colour_is_written_where_nobody_looks_or_no_color_is_set(tmp_path: Path) -> None:
    for answer in (run("doctor", state_dir=tmp_path), run("doctor", state_dir=tmp_path, NO_COLOR="1")):
        assert "\x1b[" not in answer.stdout + answer.stderr


def test_a_state_directory_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = run("up", "--detach", "--port", "0", state_dir=tmp_path / "file" / "state")
    assert answer.returncode == 2
    assert "state_dir" in answer.stderr
    assert "--state-dir DIR" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("flags", [("--grpc", "127.0.0.1:1"), ("--url", "127.0.0.1:1")])
@pytest.mark.parametrize("command", ["bench", "verify", "status"])
def test_half_an_address_of_a_cluster_elsewhere_is_wrong_usage(command: str, flags: tuple[str, str]) -> None:
    answer = run(command, *flags)
    assert answer.returncode == 2
    assert "--url" in answer.stderr


@pytest.mark.parametrize("command", ["bench", "verify", "status", "top"])
def test_a_silent_cluster_elsewhere_is_not_ready(command: str) -> None:
    answer = run(command, "--url", "http://127.0.0.1:1")
    assert answer.returncode == 3
    assert "pdserve doctor" in answer.stderr
