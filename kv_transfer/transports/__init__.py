"""Owns the choice of a transport by name. Importing it loads no transport's library."""

from __future__ import annotations

from kv_transfer.transport import Transport
from pdserve.errors import ConfigInvalid
from service_kit.config import TransferConfig


def open_transport(name: str, config: TransferConfig, host: str) -> Transport:
    """The transport `name` ("ucx", "nixl", "tcp", "inproc"; "auto" is resolved) for peers that reach this process at `host`."""
    match resolve(name, config.profile):
        case "ucx":
            from kv_transfer.transports.ucx import UcxTransport

            return UcxTransport(host, config.profile, hello_s=config.connect_s)
        case "nixl":
            from kv_transfer.transports.nixl import NixlTransport

            return NixlTransport(host, config.profile, hello_s=config.connect_s)
        case "tcp":
            from kv_transfer.transports.tcp import TCP_STREAMS, TcpTransport

            return TcpTransport(host, post_s=config.connect_s, hello_s=config.connect_s, streams=TCP_STREAMS)
        case "inproc":
            from kv_transfer.transports.inproc import InprocTransport

            return InprocTransport()
        case unknown:
            raise ConfigInvalid(
                f"transfer.transport: unknown transport {unknown!r}; known are auto, ucx, nixl, tcp, inproc."
            )


def resolve(name: str, profile: str = "host") -> str:
    """Turns "auto" into "ucx" where its library imports, else "tcp"; other names stay as they are.

    Where bytes go over TCP in any case, plain sockets are faster: ADR 1.
    """
    if name != "auto":
        return name
    if profile == "tcp":
        return "tcp"
    from kv_transfer.transports import ucx_library

    return "ucx" if ucx_library.is_installed(profile) else "tcp"
