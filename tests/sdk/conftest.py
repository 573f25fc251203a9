"""Scripted servers that end with their test."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.sdk.scripted_server import Script, ScriptedServer, ServerMaker


@pytest.fixture
def serve() -> Iterator[ServerMaker]:
    servers: list[ScriptedServer] = []

    def _serve(
        script: Script | None = None, port: int = 0, credentials: grpc.ServerCredentials | None = None
    ) -> ScriptedServer:
        servers.append(ScriptedServer(script if script is not None else Script(), port, credentials))
        return servers[-1]

    yield _serve
    for server in servers:
        server.stop()
