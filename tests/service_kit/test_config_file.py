"""Configuration: what is right loads, what is wrong refuses with path, value and reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import ConfigInvalid
from service_kit.api_keys import ApiKeys, api_keys_from
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_no_file_and_no_sets_give_the_defaults() -> None:
    assert load_config(None) == ClusterConfig()


def test_requests_wait_longer_for_a_worker_than_its_restart_is_put_off() -> None:
    config = ClusterConfig()
    assert config.pool.restart_backoff_max_s < config.controller.no_worker_grace_s < config.controller.queue_timeout_s


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(_file(tmp_path, "# nothing yet\n")) == ClusterConfig()


def test_a_file_and_sets_are_merged_and_the_last_set_wins(tmp_path: Path) -> None:
    path = _file(tmp_path, "controller: {port: 9000, queue_limit: 5}\ncontrollers: [127.0.0.1:1]\n")
    config = load_config(path, ["controller.port=1", "controller.port=2", "state_dir=/tmp/x", "transfer.lease_s=3"])
    assert (config.controller.port, config.controller.queue_limit) == (2, 5)
    assert config.controllers == ("127.0.0.1:1",)
    assert config.state_dir == Path("/tmp/x")
    assert config.transfer.lease_s == 3.0


def test_a_set_of_text_needs_no_quotes() -> None:
    config = load_config(None, ["model.served_name=123", "model.path=no", "security.tls_cert=a.pem"])
    assert (config.model.served_name, config.model.path) == ("123", "no")
    assert config.security.tls_cert == Path("a.pem")
    assert load_config(None, ["security.tls_cert=null"]).security.tls_cert is None


@pytest.mark.parametrize("value", ["off", "verified", "on"])
def test_a_bare_on_or_off_of_yaml_is_the_setting_of_that_name(tmp_path: Path, value: str) -> None:
    assert load_config(_file(tmp_path, f"controller: {{kv_blend: {value}}}\n")).controller.kv_blend == value
    assert load_config(None, [f"controller.kv_blend={value}"]).controller.kv_blend == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("controller: {prot: 1}", r"controller\.prot: unknown key; did you mean port"),
        ("controler: {}", r"controler: unknown key; did you mean controller"),
        ("controller: {port: 99999}", r"controller\.port = 99999: .*65535"),
        ("controller: {port: true}", r"controller\.port = True: .*integer"),
        ("controller: {port: '8000'}", r"controller\.port = '8000': .*integer"),
        ("engine: {block_tokens: 17}", r"engine\.block_tokens = 17: .*multiple of 16"),
        ("transfer: {lease_s: .inf}", r"transfer\.lease_s"),
        ("transfer: {lease_s: .nan}", r"transfer\.lease_s"),
        ("transfer: {transport: smoke}", r"transfer\.transport = 'smoke'"),
        ("security: {api_keys: [x]}", r"security\.api_keys: unknown key\. API keys come from .*PDSERVE_API_KEYS"),
        ("model: {served_name: 2020-01-01, path: 3}", r"model\.path = 3"),
        ("- a", "mapping of sections"),
        ("a: [", "not valid YAML"),
        ("controller: {port: 1, port: 2}", "'port' is given twice"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("controller: 5", r"controller = 5"),
    ],
)
def test_a_bad_file_refuses_with_path_value_and_reason(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigInvalid, match=expected):
        load_config(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("controller.port", "must look like"),
        ("=3", "must look like"),
        ("controller=3", "is a section"),
        ("controller.port.x=3", "nothing inside"),
        ("pool.prefil=3", "did you mean prefill"),
        ("pool.prefill=many", "pool.prefill = 'many'"),
        ("pool.prefill=", "pool.prefill = None"),
        ("controllers=a", "controllers = 'a'"),
    ],
)
def test_a_bad_set_refuses_with_path_and_reason(assignment: str, expected: str) -> None:
    with pytest.raises(ConfigInvalid, match=expected):
        load_config(None, [assignment])


def test_a_missing_or_huge_file_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigInvalid, match="larger than"):
        load_config(_file(tmp_path, "#" * 2_000_000))


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        load_config(_file(tmp_path, "pool: {prefill: -1}\nlog: {level: loud}\n"))
    assert "pool.prefill" in str(refused.value)
    assert "log.level" in str(refused.value)


@given(st.text(max_size=60))
def test_any_text_as_a_set_loads_or_refuses_typed(text: str) -> None:
    for assignment in (text, f"controller.port={text}", f"model.path={text}", f"controllers={text}"):
        try:
            load_config(None, [assignment])
        except ConfigInvalid:
            continue


def test_keys_are_read_from_the_environment_and_never_shown() -> None:
    keys = api_keys_from({"PDSERVE_API_KEYS": "first-key-1, second-key-2"})
    assert keys.accepts("Bearer first-key-1")
    assert keys.accepts("bearer second-key-2")
    assert not keys.accepts("Bearer third-key-3")
    assert not keys.accepts("Basic first-key-1")
    assert not keys.accepts(None)
    assert "first" not in repr(keys)


def test_without_keys_everybody_is_let_in() -> None:
    assert api_keys_from({}) == ApiKeys()
    assert ApiKeys().accepts(None)


@pytest.mark.parametrize("text", ["short", "good-key-1,", "good-key-1,with space in it", "schlüssel-lang"])
def test_weak_or_malformed_keys_refuse_to_start_without_showing_them(text: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        api_keys_from({"PDSERVE_API_KEYS": text})
    assert text not in str(refused.value)
