"""Owns how an answer gets onto the wire: SSE or one JSON body, keep-alives, errors before and after the first byte."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controller.http_api.chunks import KEEP_ALIVE, ChunkStream
from controller.http_api.errors import envelope
from controller.http_api.news import ClientGone, Item, NewsStream
from controller.http_api.whole_answer import WholeAnswer
from controller.request import GenerationRequest, Generator
from pdserve.errors import InternalError, PdserveError
from service_kit.logs import get_logger

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_log = get_logger(__name__)

Run = Callable[[Scope, Receive, Send], Awaitable[None]]


class DeferredResponse(Response):
    """Lets a route answer with a function over raw ASGI; errors that it raises before the first byte become HTTP errors."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(scope, receive, send)


class Delivery:
    """Runs the generators of one request and delivers what they bring. The client's going away ends them at once."""

    def __init__(self, generator: Generator, requests: Sequence[GenerationRequest], keepalive_s: float) -> None:
        self._generator = generator
        self._requests = requests
        self._keepalive_s = keepalive_s

    def stream(self, chunks: ChunkStream) -> Response:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                async with self._open(receive) as news:
                    while (first := await news.take()) == []:
                        pass  # no status is promised before the request has begun
                    await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                    await self._events(news, chunks, first, scope, send)
                    await send({"type": "http.response.body", "body": b""})
            except ClientGone:
                return

        return DeferredResponse(run)

    def whole(self, answer: WholeAnswer) -> Response:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                async with self._open(receive) as news:
                    while (items := await news.take()) is not None:
                        for prompt, item in items:
                            answer.feed(prompt, item)
            except ClientGone:
                return
            await Response(answer.result(), media_type="application/json")(scope, receive, send)

        return DeferredResponse(run)

    def _open(self, receive: Receive) -> NewsStream:
        return NewsStream([self._generator.generate(request) for request in self._requests], receive, self._keepalive_s)

    async def _events(
        self, news: NewsStream, chunks: ChunkStream, first: list[Item] | None, scope: Scope, send: Send
    ) -> None:
        """To the end, or to the first error: that is the last event, without [DONE]."""
        items = first
        try:
            while items is not None:
                body = b"".join([chunks.feed(prompt, item) for prompt, item in items]) if items else KEEP_ALIVE
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                items = await news.take()
            last = chunks.end()
        except PdserveError as error:
            last = _error_event(error, scope)
        except ClientGone:
            raise
        except Exception as error:  # after the first byte nobody further out can answer
            _log.exception("stream_failed", error, request_id=scope["state"]["request_id"])
            last = _error_event(InternalError(str(error)), scope)
        await send({"type": "http.response.body", "body": last, "more_body": True})


def _error_event(error: PdserveError, scope: Scope) -> bytes:
    return b"data: " + orjson.dumps(envelope(error, scope["state"]["request_id"])) + b"\n\n"
