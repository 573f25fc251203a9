"""Where a cluster may listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.errors import ConfigInvalid
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig, ControllerConfig, SecurityConfig, WorkerConfig
from service_kit.exposure import check_exposure

KEYS = ApiKeys((b"a-good-key",))
TLS = SecurityConfig(tls_cert=Path("c.pem"), tls_key=Path("k.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_exposure(ClusterConfig(controller=ControllerConfig(host=host)), ApiKeys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.com"])
def test_other_addresses_need_keys_and_tls(host: str) -> None:
    open_wide = ControllerConfig(host=host)
    with pytest.raises(ConfigInvalid, match=r"controller\.host.*PDSERVE_API_KEYS.*tls_cert"):
        check_exposure(ClusterConfig(controller=open_wide), ApiKeys())
    with pytest.raises(ConfigInvalid, match="tls_cert"):
        check_exposure(ClusterConfig(controller=open_wide), KEYS)
    with pytest.raises(ConfigInvalid, match="PDSERVE_API_KEYS"):
        check_exposure(ClusterConfig(controller=open_wide, security=TLS), ApiKeys())
    check_exposure(ClusterConfig(controller=open_wide, security=TLS), KEYS)
    check_exposure(ClusterConfig(controller=open_wide, security=SecurityConfig(insecure=True)), ApiKeys())


def test_a_workers_address_counts_too() -> None:
    with pytest.raises(ConfigInvalid, match=r"worker\.host"):
        check_exposure(ClusterConfig(worker=WorkerConfig(host="0.0.0.0")), ApiKeys())


def test_half_a_key_pair_is_refused_everywhere() -> None:
    with pytest.raises(ConfigInvalid, match="belong together"):
        check_exposure(ClusterConfig(security=SecurityConfig(tls_cert=Path("c.pem"))), KEYS)
