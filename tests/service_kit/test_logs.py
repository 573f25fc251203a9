"""Log lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service_kit.config import LogConfig
from service_kit.logs import configure_logs, get_logger


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_one_json_line_with_its_fields() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(), "p0", stream)
    get_logger("x").info("worker_registered", worker_id="p0", roles=("prefill",), level=3)
    line = json.loads(stream.getvalue())
    assert line["event"] == "worker_registered"
    assert line["process"] == "p0"
    assert line["worker_id"] == "p0"
    assert line["roles"] == ["prefill"]
    assert line["level"] == "info"  # a field cannot overwrite the head


def test_a_traceback_stays_on_the_line() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(), "p0", stream)
    get_logger("x").exception("call_failed", ValueError("bad\nthing"), request_id="r")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: bad" in json.loads(stream.getvalue())["traceback"]


def test_levels_below_the_configured_one_are_silent() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(level="warning"), "p0", stream)
    get_logger("x").info("quiet")
    assert stream.getvalue() == ""


def test_text_form_is_readable_and_long_values_are_cut() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(format="text"), "d0", stream)
    get_logger("x").warning("slow", prompt="y" * 10_000)
    assert "warning d0 slow prompt=yyy" in " ".join(stream.getvalue().split())
    assert len(stream.getvalue()) < 3000
