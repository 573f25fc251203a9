"""The operators' KV API over HTTP: what reaches the desk, what comes back, what is refused."""

from __future__ import annotations

import httpx
import pytest

from controller.kv_operations import Prompt, Selection
from tests.controller.http_api.server import ApiServer
from tokenization.tokenizer import ids_to_bytes

KEY = "ab" * 32


def test_figures_and_pages_are_plain_json(client: httpx.Client) -> None:
    (worker,) = client.get("/api/v1/kv").json()["workers"]
    assert worker["tiers"][0]["verify_failures"] == {"checksum": 1}
    pages = client.get("/api/v1/kv/pages", params={"tier": "host", "limit": 5}).json()
    assert pages["pages"][0]["key"] == KEY
    assert pages["silent"] == [{"worker": "d0", "reason": "timeout", "message": "The worker did not answer."}]


def test_a_prompt_is_explained_by_its_tokens(api: ApiServer, client: httpx.Client) -> None:
    text = client.post("/api/v1/kv/explain", json={"prompt": "Hello", "cache_salt": "s"})
    assert text.json()["prompt_tokens"] > 0
    client.post("/api/v1/kv/explain", json={"prompt": [1, 2, 3]}).raise_for_status()
    expected = api.tokenizer.encode("Hello", add_special_tokens=True)
    assert [asked[1] for asked in api.operations.kv.asked] == [Prompt(expected, "s"), Prompt(ids_to_bytes([1, 2, 3]))]


def test_pins_flushes_and_checks_say_what_they_mean(api: ApiServer, client: httpx.Client) -> None:
    client.post("/api/v1/kv/pin", json={"keys": [KEY], "tier": "disk", "hold_s": 60}).raise_for_status()
    client.post("/api/v1/kv/flush", json={}).raise_for_status()
    answer = client.post("/api/v1/kv/verify", json={"worker": "p0", "deadline_s": 2.5, "after": KEY}).json()
    assert api.operations.kv.asked == [
        ("pin", Selection(tier="disk", keys=(bytes.fromhex(KEY),)), 60),
        ("flush", Selection(), 0.0),
        ("verify", Selection(worker_id="p0"), 2.5),
    ]
    assert answer["outcomes"][0]["bad_keys"] == ["cd" * 32]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("pin", {"keys": ["xyz"], "hold_s": 1}, "keys[0]"),
        ("pin", {"keys": [KEY]}, "hold_s"),
        ("flush", {"teir": "host"}, "teir"),
        ("verify", {"deadline_s": 100}, "deadline_s"),
        ("explain", {"prompt": []}, "prompt"),
        ("explain", {"prompt": ""}, "prompt"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    client: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    answer = client.post(f"/api/v1/kv/{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_unknown_worker_is_not_found(client: httpx.Client) -> None:
    answer = client.post("/api/v1/kv/flush", json={"worker": "nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
