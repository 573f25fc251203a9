"""What commands print, and how they end: forms, colours, next commands, exit statuses, sentences about a request."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from pdserve.cli import up
from pdserve.cli.access import Access, error_of
from pdserve.cli.cluster_state import next_command
from pdserve.cli.first_answer import path_of
from pdserve.cli.main import exit_code
from pdserve.cli.record import Record
from pdserve.cli.snippets import python_snippet, shell_snippet
from pdserve.cli.sse import events
from pdserve.cli.terminal import Form, Terminal, seconds, size
from pdserve.errors import (
    ConfigInvalid,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PdserveError,
    Unavailable,
)


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(form: Form) -> tuple[str, str]:
    out, err = Screen(), Screen()
    terminal = Terminal(form, out, err)
    terminal.progress("ok", "d0", "ready")
    terminal.say("a result → for people")
    terminal.table(("A", "B"), [("1", "2")])
    terminal.line("fail", "check", "failed")
    terminal.result({"a": 1})
    terminal.error("not_found", "No such thing.")
    return out.getvalue(), err.getvalue()


def test_text_goes_to_stdout_and_errors_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = shown("text")
    assert "a result → for people" in out
    assert "\x1b[32m✓" in out
    assert err == "pdserve: No such thing.\n"


def test_json_alone_is_on_stdout_with_progress_and_errors_beside_it() -> None:
    out, err = shown("json")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"a": 1},
        {"error": {"code": "not_found", "message": "No such thing."}},
    ]
    assert "ready" in err
    assert "No such thing." in err
    assert "for people" not in err


def test_no_color_is_honoured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in "".join(shown("text"))


def test_a_terminal_without_unicode_gets_ascii() -> None:
    class Old(Screen):
        encoding = "ascii"

    out = Old()
    terminal = Terminal("text", out, out)
    terminal.line("ok", "p0", "p0 → d0…")
    assert out.getvalue().isascii()
    assert "ok p0" in out.getvalue()
    assert "p0 -> d0..." in out.getvalue()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigInvalid("x"), 2),
        (InvalidRequest("x"), 2),
        (Unavailable("x"), 3),
        (DeadlineExceeded("x"), 3),
        (NotFound("x"), 1),
        (Overloaded("x"), 1),
        (InternalError("x"), 1),
    ],
)
def test_every_error_has_an_exit_status(error: PdserveError, code: int) -> None:
    assert exit_code(error) == code


def test_the_next_command_names_the_state_directory_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PDSERVE_STATE_DIR", raising=False)
    assert next_command("status", Path(".pdserve")) == "pdserve status"
    assert next_command("up --detach", tmp_path) == f"pdserve up --detach --state-dir {tmp_path}"
    monkeypatch.setenv("PDSERVE_STATE_DIR", str(tmp_path))
    assert next_command("status", tmp_path) == "pdserve status"


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    up.add(parser.add_subparsers())
    return parser.parse_args(["up", "--state-dir", "/s", *arguments])


@pytest.mark.parametrize(
    ("arguments", "sets"),
    [
        ((), []),
        (("--prefill", "2", "--port", "0"), ["pool.prefill=2", "controller.port=0"]),
        (("--both", "2"), ["pool.prefill=0", "pool.decode=0", "pool.both=2"]),
        (("--both", "1", "--decode", "1"), ["pool.decode=1", "pool.both=1"]),
        (("--insecure", "--transport", "tcp"), ["transfer.transport=tcp", "security.insecure=true"]),
        (("--model", "m", "--set", "model.path=n"), ["model.path=m", "model.path=n"]),
    ],
)
def test_flags_of_up_become_assignments_and_set_comes_last(arguments: tuple[str, ...], sets: list[str]) -> None:
    assert up._sets(parsed(*arguments)) == ["state_dir=/s", *sets]


def timeline(**attempt: object) -> Record:
    plain = {"decode_worker": "d0", "prefill_worker": "p0", "prefill_s": 0.041, "kv_bytes": 1_200_000}
    summary = {"output_tokens": 62, "choices": 1, "ttft_s": 0.5, "total_s": 1.5}
    return Record({"attempts": [{**plain, "transfer_s": 0.0008, "transport": "ucx", **attempt}], "summary": summary})


def test_the_path_of_a_request_is_one_sentence() -> None:
    assert path_of(timeline(kind="split")) == "prefill p0 41 ms → 1.2 MB KV 0.8 ms over ucx → decode d0 61 tok/s"
    assert "nothing handed over" in path_of(timeline(kind="local_prefill"))
    with pytest.raises(NotFound):
        path_of(Record({"attempts": [], "summary": {}}))


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(0.0, "0.0 ms"), (0.0008, "0.8 ms"), (0.0412, "41 ms"), (0.9996, "1.0 s"), (62.0, "62.0 s")],
)
def test_durations_are_readable(value_s: float, text: str) -> None:
    assert seconds(value_s) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1200, "1.2 KB"), (268_435_456, "268 MB")])
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


def test_an_error_event_of_a_stream_is_raised_typed() -> None:
    lines = [": alive", 'data: {"choices": []}', "", 'data: {"error": {"code": "overloaded", "message": "full"}}']
    got = events(lines)
    assert next(got).records("choices") == []
    with pytest.raises(Overloaded, match="full"):
        next(got)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(InternalError, match="before it was done"):
        list(events(['data: {"choices": []}']))
    assert list(events(["data: [DONE]"])) == []


@pytest.mark.parametrize(("field", "getter"), [("a", "text"), ("missing", "integer"), ("b", "records")])
def test_a_record_refuses_fields_of_another_type(field: str, getter: str) -> None:
    with pytest.raises(InternalError, match=field):
        getattr(Record({"a": 1, "b": "x"}), getter)(field)


def test_a_refused_key_names_the_variable_to_set() -> None:
    body = b'{"error": {"message": "No valid API key.", "type": "x", "param": null, "code": "invalid_api_key"}}'
    assert "PDSERVE_API_KEY" in error_of(401, body).message
    assert error_of(404, body).message == "No valid API key."
    assert "HTTP 502" in error_of(502, b"<html>").message


def test_the_curl_example_sets_the_key_where_only_the_servers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_API_KEY", raising=False)
    keyed = Access("http://127.0.0.1:1", "127.0.0.1:2", "secret-key")
    assert shell_snippet(keyed, "m").startswith("export PDSERVE_API_KEY=")
    monkeypatch.setenv("PDSERVE_API_KEY", "secret-key")
    for text in (shell_snippet(keyed, "m"), python_snippet(keyed, "m")):
        assert "PDSERVE_API_KEY" in text
        assert "secret-key" not in text
    compile(python_snippet(keyed, "m"), "snippet", "exec")
    assert "Bearer" not in shell_snippet(Access("http://127.0.0.1:1", "127.0.0.1:2"), "m")
