"""`pdserve kv`: what is asked of the API, what is printed, how it ends."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdserve.cli.main import main

KEY, OTHER = "ab" * 32, "cd" * 32
Body = dict[str, object]


class ApiTwin:
    """Answers by path, in order, the last one for ever; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Body]] = []
        self.answers: dict[str, list[Body]] = {}
        twin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, body: Body) -> None:
                twin.asked.append((self.path, body))
                rows = twin.answers[self.path.split("?")[0].removeprefix("/api/v1/kv")]
                content = json.dumps(rows.pop(0) if len(rows) > 1 else rows[0]).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(30.0)


@pytest.fixture
def twin() -> Iterator[ApiTwin]:
    api = ApiTwin()
    yield api
    api.close()


@pytest.fixture
def kv(twin: ApiTwin) -> Callable[..., int]:
    """Runs `pdserve kv NAME …`; its exit status."""

    def run(name: str, *arguments: str) -> int:
        return main(["kv", name, "--url", twin.url, *arguments])

    return run


Kv = Callable[..., int]


def outcome(tier: str = "host", **changes: object) -> Body:
    plain: Body = {
        "worker": "p0", "tier": tier, "pages": 3, "bad": 0, "checked_bytes": 3000, "cut": False, "last_key": "",
        "bad_keys": [], "failure": "",
    }  # fmt: skip
    return {**plain, **changes}


def answered(*outcomes: Body, silent: tuple[Body, ...] = ()) -> Body:
    return {"outcomes": list(outcomes), "silent": list(silent)}


SILENT: Body = {"worker": "d0", "reason": "timeout", "message": "The worker did not answer within 10 s."}


def test_explain_prints_a_row_per_worker_with_the_tokens_of_every_tier(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = [
        {"worker": "d0", "tokens": {"device": 32, "redis": 16}, "reusable_tokens": 32},
        {"worker": "p0", "tokens": {"device": 0, "host": 48, "disk": 48, "tape": 16}, "reusable_tokens": 48},
    ]
    twin.answers["/explain"] = [{"prompt_tokens": 50, "keyed_tokens": 48, "workers": workers, "silent": []}]
    assert kv("explain", "Why?", "--cache-salt", "s") == 0
    assert twin.asked == [("/api/v1/kv/explain", {"prompt": "Why?", "cache_salt": "s"})]
    lines = capsys.readouterr().out.splitlines()
    assert "50 prompt tokens, 48 in whole units of 16" in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["WORKER", "DEVICE", "HOST", "DISK", "REDIS", "TAPE", "REUSABLE"],
        ["d0", "32", "-", "-", "16", "-", "32"],
        ["p0", "0", "48", "48", "-", "16", "48"],
    ]
    assert kv("explain", "--token-ids", "1, 2,3") == 0
    assert twin.asked[-1][1] == {"prompt": [1, 2, 3]}


def test_explain_reads_a_long_prompt_from_standard_input(
    twin: ApiTwin, kv: Kv, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin.answers["/explain"] = [{"prompt_tokens": 1, "keyed_tokens": 0, "workers": [], "silent": []}]
    monkeypatch.setattr("sys.stdin", io.StringIO("a long prompt\n"))
    assert kv("explain", "-") == 0
    assert twin.asked[-1][1] == {"prompt": "a long prompt\n"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain",),
        ("explain", "text", "--token-ids", "1"),
        ("explain", "--token-ids", "one"),
        ("pin",),
        ("pin", "nokey"),
        ("flush", "--prompt", "a", "--token-ids", "1", "--yes"),
        ("ls", "--limit", "0"),
        ("frob",),
        (),
    ],
)
def test_wrong_usage_ends_with_2_and_asks_nothing(twin: ApiTwin, arguments: tuple[str, ...]) -> None:
    place = ["--url", twin.url] if arguments else []
    with pytest.raises(SystemExit) as ended:  # argparse ends like this by itself
        raise SystemExit(main(["kv", *arguments[:1], *place, *arguments[1:]]))
    assert ended.value.code == 2
    assert not twin.asked


def test_ls_shows_whole_keys_and_says_who_was_silent(twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]) -> None:
    page = {
        "worker": "p0", "tier": "disk", "key": KEY, "parent": OTHER, "size_bytes": 4096, "age_s": 2.0, "refs": 1,
        "held_s": 60.0,
    }  # fmt: skip
    twin.answers["/pages"] = [{"pages": [page], "silent": [SILENT]}]
    assert kv("ls", "--tier", "disk", "--limit", "5") == 1
    assert twin.asked == [("/api/v1/kv/pages?worker=&tier=disk&limit=5", {})]
    out = capsys.readouterr().out
    assert f"{KEY}  p0" in out
    assert "60.0 s" in out
    assert "no answer: The worker did not answer within 10 s." in out


def test_stat_shows_every_tier_with_its_means(twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]) -> None:
    tier = {
        "tier": "host", "capacity_bytes": 0, "used_bytes": 4096, "pages": None, "hit_tokens": 320, "miss_tokens": 16,
        "bytes_in": 1, "bytes_out": 1, "read_s": 0.04, "read_pages": 20, "write_s": 0.0, "stored": 0, "evicted": 4,
        "evicted_age_s": 40.0, "expired": 0, "dropped": 2, "failures": 0, "verify_failures": {"checksum": 2},
    }  # fmt: skip
    loads = {
        "queried_tokens": 100, "loaded_tokens": {"host": 64, "disk": 16}, "late": 1, "no_room": 0, "not_worth_it": 0,
        "offers_skipped": 0, "dropped_on_the_way_down": 0, "load_s": 0.2,
    }  # fmt: skip
    worker = {
        "worker": "p0", "block_tokens": 16, "device_tokens": 100, "device_free_tokens": 60, "device_query_tokens": 50,
        "device_hit_tokens": 25, "held_tokens": {}, "tiers": [tier], "loads": loads,
    }  # fmt: skip
    twin.answers[""] = [{"workers": [worker]}]
    assert kv("stat") == 0
    out = capsys.readouterr().out
    assert "p0: device 40 of 100 tokens in use; prefix index 25 of 50 tokens hit" in out
    assert "80 loaded (disk 16, host 64) in 200 ms; 1 loads late" in out
    row = out.splitlines()[-1]
    assert "2.0 ms" in row  # per page read
    assert "10.0 s" in row  # mean age
    assert "2 checksum" in row


def test_pin_names_the_pages_and_what_is_nowhere_is_an_error(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    twin.answers["/pin"] = [answered(outcome(pages=1)), answered(outcome(pages=0))]
    assert kv("pin", KEY.upper(), "--for", "60") == 0
    assert twin.asked == [("/api/v1/kv/pin", {"keys": [KEY], "hold_s": 60.0})]
    assert "p0: 1 pages in host held for 60 s" in capsys.readouterr().out
    assert kv("pin", KEY) == 1
    assert "pdserve kv ls" in capsys.readouterr().err


def test_flush_asks_for_yes_where_nobody_can_be_asked(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert kv("flush") == 2
    assert "everything from all tiers and the device's prefix cache of all workers" in capsys.readouterr().err
    assert not twin.asked
    twin.answers["/flush"] = [answered(outcome("device"), outcome(pages=1000, cut=True)), answered(outcome(pages=7))]
    assert kv("flush", "--yes") == 0
    assert [asked for asked, _ in twin.asked] == ["/api/v1/kv/flush"] * 2
    out = capsys.readouterr().out
    assert "p0: prefix cache cleared" in out
    assert "p0: 1007 pages dropped from host" in out


class Person(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("line", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_a_person_is_asked_before_anything_is_dropped(
    twin: ApiTwin, kv: Kv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, code: int
) -> None:
    monkeypatch.setattr("sys.stdin", Person(line))
    twin.answers["/flush"] = [answered(outcome())]
    assert kv("flush", "--tier", "host", "--worker", "p0") == code
    assert "Drop everything from host of p0? [y/N]" in capsys.readouterr().err
    assert len(twin.asked) == (code == 0)


def test_verify_goes_on_where_it_was_cut_and_ends_with_4_where_a_page_was_bad(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    twin.answers["/verify"] = [
        answered(outcome(), outcome("disk", cut=True, last_key=KEY)),
        answered(outcome("disk", bad=1, bad_keys=[OTHER])),
    ]
    assert kv("verify", "--max-bytes", "1000") == 4
    assert [body for _, body in twin.asked] == [
        {"deadline_s": 5.0, "max_bytes": 1000},
        {"deadline_s": 5.0, "max_bytes": 1000, "worker": "p0", "tier": "disk", "after": KEY},
    ]
    out = capsys.readouterr().out
    assert "disk: 6 pages good, 1 bad" in out
    assert OTHER in out


def test_verify_without_bad_pages_ends_with_0_and_json_is_one_object(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    twin.answers["/verify"] = [answered(outcome())]
    assert kv("verify", "-o", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pages"], report["bad"], report["complete"]) == (3, 0, True)


def test_verify_that_runs_out_of_time_says_that_there_is_more(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    twin.answers["/verify"] = [answered(outcome(cut=True, last_key=KEY))]
    assert kv("verify", "--seconds", "0") == 0
    assert "there are more" in capsys.readouterr().out


def test_a_tier_that_fails_and_a_silent_worker_are_told_and_end_with_1(
    twin: ApiTwin, kv: Kv, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = outcome("redis", pages=0, failure="Redis at x failed.")
    twin.answers["/verify"] = [answered(outcome(), failed, silent=(SILENT,))]
    assert kv("verify") == 1
    out = capsys.readouterr().out
    assert "Redis at x failed." in out
    assert "did not answer" in out


@pytest.mark.parametrize("name", ["ls", "stat", "explain", "pin", "flush", "verify"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["kv", name, "--help"])
    assert ended.value.code == 0
    assert "-o {text,json}" in capsys.readouterr().out
