"""Owns a real HTTP server of the tests: the controller's, in a thread, on a free port, over the twins."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvloop

from controller.http_api.app import create_app
from controller.http_server import HttpServer, bind
from controller.operations import ModelInfo
from service_kit.api_keys import ApiKeys
from service_kit.config import BlendSetting, ControllerConfig, SecurityConfig
from service_kit.metrics import Metrics
from tests.controller.blend_twins import open_gate
from tests.controller.http_api.twins import GeneratorTwin, OperationsTwin
from tests.tokenization.fixtures import byte_level_backend, write_model_dir
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer

CONTEXT_TOKENS = 256
MAX_BODY_BYTES = 64 * 1024
KEEPALIVE_S = 0.2
CLIENT_STALL_S = 1.0
SEND_BUFFER_BYTES = 2**16  # of the kernel, so that little output fills it
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ApiServer:
    port: int
    generator: GeneratorTwin
    operations: OperationsTwin
    tokenizer: Tokenizer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


def tiny_model(folder: Path) -> ModelInfo:
    write_model_dir(folder, byte_level_backend())
    return ModelInfo("tiny", 1, CONTEXT_TOKENS, Tokenizer.load(folder), ChatTemplate.load(folder))


@contextmanager
def serve(
    folder: Path,
    api_keys: ApiKeys = ApiKeys(),  # noqa: B008 (frozen)
    *,
    kv_blend: BlendSetting = "on",
) -> Iterator[ApiServer]:
    model = tiny_model(folder)
    generator, operations = GeneratorTwin(model.tokenizer), OperationsTwin(blends=open_gate(kv_blend))
    config = ControllerConfig(max_body_bytes=MAX_BODY_BYTES, sse_keepalive_s=KEEPALIVE_S, max_choices=4)
    app = create_app(generator, operations, model, config, Metrics("tiny"), api_keys)
    with bind("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.listen(64)  # clients may connect before the server has started
        server = HttpServer(app, listener, SecurityConfig(), CLIENT_STALL_S)
        thread = threading.Thread(target=lambda: uvloop.run(server.serve()), daemon=True)
        thread.start()
        try:
            yield ApiServer(listener.getsockname()[1], generator, operations, model.tokenizer)
        finally:
            server.stop()
            thread.join(STOP_TIMEOUT_S)
            assert not thread.is_alive(), "the server did not stop"
