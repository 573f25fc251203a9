"""Owns the load generator, a process of its own: `python -m benchmarks.load --url HOST:PORT …`, a LoadReport as JSON on stdout.

Closed loop: `streams` clients, each sends its next request when the last one has ended. Prompts are random token ids, so that no
prefix is shared within a run; two runs over one cluster need two seeds, or the second finds the prompts of the first cached.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time

import msgspec
import uvloop

from benchmarks.http_stream import CompletionConnection, StreamFailed, StreamTimes
from benchmarks.report import percentile

RAMP_S = 0.5  # clients start spread over this time: 256 at the same instant measure a burst, not a load


class LoadSettings(msgspec.Struct, frozen=True):
    host: str
    port: int
    streams: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # no request is begun after so long
    seed: int = 1


class LoadReport(msgspec.Struct, frozen=True):
    """All times in seconds."""

    requests: int
    failures: int
    first_failure: str
    tokens: int
    wall_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    cpu_s: float


class _Usage(msgspec.Struct):
    completion_tokens: int


class _LastEvent(msgspec.Struct):
    usage: _Usage


class Load:
    """One run over one server."""

    def __init__(self, settings: LoadSettings) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._left = settings.requests
        self._streams: list[StreamTimes] = []
        self._failures: list[str] = []

    async def run(self) -> LoadReport:
        start_s, cpu_s = time.monotonic(), time.process_time()
        stop_s = start_s + self._settings.seconds
        async with asyncio.TaskGroup() as group:
            for number in range(self._settings.streams):
                group.create_task(self._client(RAMP_S * number / self._settings.streams, stop_s))
        return self._report(time.monotonic() - start_s, time.process_time() - cpu_s)

    async def _client(self, delay_s: float, stop_s: float) -> None:
        await asyncio.sleep(delay_s)
        connection: CompletionConnection | None = None
        while self._left > 0 and time.monotonic() < stop_s:
            self._left -= 1
            try:
                connection = connection or await CompletionConnection.open(self._settings.host, self._settings.port)
                self._streams.append(await connection.post(*self._request(), deadline_s=60.0))
            except (StreamFailed, TimeoutError, OSError) as error:
                self._failures.append(f"{type(error).__name__}: {error}")
                if connection is not None:
                    connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _request(self) -> tuple[bytes, bytes]:
        settings = self._settings
        body = msgspec.json.encode(
            {
                "prompt": [self._random.randrange(100, 1000) for _ in range(settings.prompt_tokens)],
                "max_tokens": settings.output_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "seed": self._random.randrange(2**31),
            }
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {settings.host}:{settings.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode(), body

    def _report(self, wall_s: float, cpu_s: float) -> LoadReport:
        decode = msgspec.json.Decoder(_LastEvent).decode
        ttft = [times.ttft_s for times in self._streams] or [0.0]
        gaps = [b - a for times in self._streams for a, b in zip(times.event_s, times.event_s[1:], strict=False)] or [
            0.0
        ]
        return LoadReport(
            requests=len(self._streams),
            failures=len(self._failures),
            first_failure=self._failures[0] if self._failures else "",
            tokens=sum(decode(times.last_event).usage.completion_tokens for times in self._streams),
            wall_s=wall_s,
            ttft_p50_s=percentile(ttft, 50),
            ttft_p99_s=percentile(ttft, 99),
            itl_p50_s=percentile(gaps, 50),
            itl_p99_s=percentile(gaps, 99),
            cpu_s=cpu_s,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Closed-loop load of streamed completions.")
    parser.add_argument("--url", required=True, help="HOST:PORT of the HTTP API")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    host, _, port = given.url.rpartition(":")
    settings = LoadSettings(
        host,
        int(port),
        given.streams,
        given.requests,
        given.prompt_tokens,
        given.output_tokens,
        given.seconds,
        given.seed,
    )
    report = uvloop.run(Load(settings).run())
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
