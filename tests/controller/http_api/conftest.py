from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.controller.http_api.server import ApiServer, serve


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serve(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture
def api(running: ApiServer) -> ApiServer:
    running.generator.reset()
    running.operations.reset()
    return running


@pytest.fixture
def client(api: ApiServer) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client
