"""Owns whether a cluster may listen where it was told to: off loopback only with API keys and TLS. Pure."""

from __future__ import annotations

import ipaddress

from pdserve.errors import ConfigInvalid
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig


def check_exposure(config: ClusterConfig, keys: ApiKeys) -> None:
    """Raises ConfigInvalid for an address that others can reach, unless keys and TLS protect it or `security.insecure` is set."""
    security = config.security
    if (security.tls_cert is None) != (security.tls_key is None):
        raise ConfigInvalid("security.tls_cert and security.tls_key belong together: give both or none.")
    if security.insecure:
        return
    missing = []
    if not keys:
        missing.append("API keys (environment variable PDSERVE_API_KEYS)")
    if security.tls_cert is None:
        missing.append("security.tls_cert and security.tls_key")
    if not missing:
        return
    for dotted, host in (("controller.host", config.controller.host), ("worker.host", config.worker.host)):
        if not is_loopback(host):
            raise ConfigInvalid(
                f"{dotted} = {host}: others can reach that address, so {' and '.join(missing)} must be set. "
                "Use 127.0.0.1, or security.insecure=true (--insecure) where the network is trusted."
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name: it may resolve to anything
