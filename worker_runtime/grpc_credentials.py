"""Owns who may speak gRPC with this worker: mutual TLS between the processes of a cluster that has a CA, else plain on loopback."""

from __future__ import annotations

from pathlib import Path

import grpc

from kv_transfer.peers import open_insecure_channel
from pdserve.errors import ConfigInvalid
from service_kit.config import ClusterConfig, SecurityConfig
from service_kit.exposure import is_loopback

_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


def check_worker_exposure(config: ClusterConfig) -> None:
    """Raises ConfigInvalid where others can reach the worker and no CA tells who they are: a worker knows no API keys."""
    if is_loopback(config.worker.host) or config.security.insecure or _mutual(config.security) is not None:
        return
    raise ConfigInvalid(
        f"worker.host = {config.worker.host}: others can reach that address, so security.tls_ca, tls_cert and tls_key must be "
        "set. Use 127.0.0.1, or security.insecure=true (--insecure) where the network is trusted."
    )


class GrpcCredentials:
    """Read once at start. Raises ConfigInvalid where a file cannot be read."""

    def __init__(self, security: SecurityConfig) -> None:
        mutual = _mutual(security)
        # Without a CA the controller serves TLS to its clients alone; its certificate is then the one to trust.
        to_controllers = mutual or _files(security.tls_cert, security)
        self.server = _server(mutual) if mutual is not None else None
        self._to_workers = _channel(mutual)
        self._to_controllers = _channel(to_controllers)

    def open_worker_channel(self, address: str) -> grpc.aio.Channel:
        return _open(address, self._to_workers)

    def open_controller_channel(self, address: str) -> grpc.aio.Channel:
        return _open(address, self._to_controllers)


_Files = tuple[Path, Path, Path]  # authority, key, certificate


def _files(authority: Path | None, security: SecurityConfig) -> _Files | None:
    if authority is None or security.tls_key is None or security.tls_cert is None:
        return None
    return authority, security.tls_key, security.tls_cert


def _mutual(security: SecurityConfig) -> _Files | None:
    return _files(security.tls_ca, security)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"security: {path} cannot be read: {error.strerror}.") from error


def _server(files: _Files) -> grpc.ServerCredentials:
    root, key, certificate = (_read(path) for path in files)
    return grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=True)


def _channel(files: _Files | None) -> grpc.ChannelCredentials | None:
    if files is None:
        return None
    root, key, certificate = (_read(path) for path in files)
    return grpc.ssl_channel_credentials(root, key, certificate)


def _open(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return open_insecure_channel(address)
    return grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
