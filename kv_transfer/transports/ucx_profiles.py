"""Owns the UCX settings per profile. UCX reads them from the environment once, when its library loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

_EVERYWHERE = {
    # A cut link is seen in seconds, not half a minute; the hand-off's heartbeats are faster still.
    "UCX_TCP_KEEPIDLE": "1s",
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "3",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # Lost peers are our normal case and are raised as errors.
    "UCX_LOG_LEVEL": "fatal",
    "UCXX_LOG_LEVEL": "fatal",
}

PROFILES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        # Endpoints with error handling admit shared memory only with UCX_MM_ERROR_HANDLING: 1 GB/s without, 10 with it.
        "host": {
            **_EVERYWHERE,
            "UCX_TLS": "posix,self,tcp",
            "UCX_MM_ERROR_HANDLING": "y",
            "UCX_TCP_TX_SEG_SIZE": "512K",
            "UCX_TCP_RX_SEG_SIZE": "512K",
        },
        # Shared memory is left out: two network namespaces of one host would use it and not notice a cut.
        "tcp": {
            **_EVERYWHERE,
            "UCX_TLS": "tcp",
            "UCX_TCP_TX_SEG_SIZE": "128K",
            "UCX_TCP_RX_SEG_SIZE": "128K",
            # The peer's bytes are read from the socket straight into the receive's buffer; else they are copied there once more.
            "UCX_RNDV_SCHEME": "put_zcopy",
        },
        # PyPI's libucx has no verbs: a system UCX is preferred, and UCX chooses among its transports.
        "rdma": {**_EVERYWHERE, "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY": "true"},
    }
)

# Endpoints between two peers, each a socket of its own where UCX uses TCP: while the one is read, the others fill, and no flow of a
# network's limit per flow bounds the whole. Shared memory has no use for more than one queue; RDMA is left to UCX.
STREAMS: Mapping[str, int] = MappingProxyType({"host": 1, "tcp": 4, "rdma": 1})


def apply_profile(profile: str) -> None:
    """Sets what the operator's environment does not set already. Before the library is imported."""
    for name, value in PROFILES[profile].items():
        os.environ.setdefault(name, value)
