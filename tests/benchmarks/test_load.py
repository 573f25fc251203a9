"""The load generator against a small server that speaks the stream format, whole and broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvloop

from benchmarks.load import Load, LoadReport, LoadSettings

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


WHOLE = HEAD + chunk(TOKEN) + chunk(b": keepalive\n\n" + TOKEN) + chunk(TOKEN + USAGE) + chunk(DONE) + chunk(b"")


@asynccontextmanager
async def server(answer: bytes, write: Callable[[asyncio.StreamWriter, bytes], None]) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                write(writer, answer)
                await writer.drain()
                if answer is not WHOLE:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has left
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def write_whole(writer: asyncio.StreamWriter, answer: bytes) -> None:
    writer.write(answer)


def write_bytewise(writer: asyncio.StreamWriter, answer: bytes) -> None:
    for position in range(len(answer)):
        writer.write(answer[position : position + 1])


async def load(port: int, streams: int = 2, requests: int = 5) -> LoadReport:
    return await Load(LoadSettings("127.0.0.1", port, streams, requests, 4, 3, 10.0)).run()


async def test_streams_are_counted_and_timed_over_kept_connections() -> None:
    async with server(WHOLE, write_whole) as port:
        report = await load(port)
    assert (report.requests, report.failures, report.tokens) == (5, 0, 15)
    assert 0 < report.ttft_p50_s <= report.ttft_p99_s < report.wall_s


def test_the_generator_runs_on_uvloop_as_its_process_does() -> None:
    async def scenario() -> LoadReport:
        async with server(WHOLE, write_whole) as port:
            return await load(port)

    assert uvloop.run(scenario()).requests == 5


async def test_a_stream_is_understood_however_it_is_cut() -> None:
    async with server(WHOLE, write_bytewise) as port:
        report = await load(port)
    assert (report.requests, report.failures, report.tokens) == (5, 0, 15)


async def test_a_stream_without_an_end_counts_as_failed() -> None:
    async with server(HEAD + chunk(TOKEN), write_whole) as port:
        report = await load(port, requests=2)
    assert (report.requests, report.failures) == (0, 2)
    assert "lost" in report.first_failure


async def test_an_error_answer_counts_as_failed_with_its_text() -> None:
    busy = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
    async with server(busy, write_whole) as port:
        report = await load(port, requests=1)
    assert report.failures == 1
    assert "429" in report.first_failure
