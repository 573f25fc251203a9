"""Owns how the SDK connects: address, TLS, key, channel options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from pdserve.errors import ConfigInvalid

ApiKey = str | Callable[[], str]

MAX_RECEIVE_BYTES = 256 * 2**20  # prompt log-probabilities of a long prompt come in one message

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A restarted controller comes back at the same address: do not sit out gRPC's default back-off of two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the deadline of an attempt: a busy peer answers late
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A cut that no FIN announced is seen within 15 s. Shorter pings need a server that allows them.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection that one client broke is not another's
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. ca: what the server's certificate is checked against (None = the system's); cert and key: for mutual TLS."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigInvalid where a file cannot be read."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))


def authorization(api_key: ApiKey | None) -> tuple[tuple[str, str], ...]:
    """Metadata of one call. A callable is asked for every call, so that keys can rotate."""
    key = api_key() if callable(api_key) else api_key
    return (("authorization", f"Bearer {key}"),) if key else ()


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, tls.credentials(), options=CHANNEL_OPTIONS)


def open_async_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, tls.credentials(), options=CHANNEL_OPTIONS)


def _read(path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"TLS file {path} cannot be read: {error.strerror}.") from error
