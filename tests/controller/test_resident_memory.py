"""The controller and whole workers around modelled engines hold no more memory after ten thousand requests than after two thousand."""

from __future__ import annotations

import asyncio
import random
from array import array

import msgspec
import pytest

from controller.request import GenerationRequest, Route, SamplingSpec
from simulator.modelled_engine import LAYOUT, ModelledConfig
from tests.controller.cluster_twin import ClusterTwin
from tests.controller.test_modelled_fleet import all_free, controller_with
from tests.held_memory import held

REQUESTS, WARM_UP, BATCH = 10_000, 2_000, 50
HANDED_OFF = 20  # one batch in so many: a hand-off takes five times as long as a request of one worker
ALLOWED_BYTES = 8 << 20  # 1 KiB per request
ALLOWED_OBJECTS = 2_000  # of those that the garbage collector tracks: one per four requests
SMALL = ModelledConfig(layout=msgspec.structs.replace(LAYOUT, blocks=512))  # full of prefixes when the warm-up ends

pytestmark = pytest.mark.slow


def asked(number: int, source: random.Random, route: Route | None) -> GenerationRequest:
    """A prompt of its own, so that blocks are evicted and everybody's view of them changes all the time."""
    prompt = array("i", [source.randrange(20, 90) for _ in range(source.randrange(1, 120))])
    sampling = SamplingSpec(max_tokens=source.choice([1, 2, 5]), seed=number, ignore_eos=True)
    return GenerationRequest(f"m{number}", prompt.tobytes(), sampling, want_text=False, route=route)


async def cancelled(twin: ClusterTwin, request: GenerationRequest) -> None:
    stream = twin.service.generate(request)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]


async def batch(twin: ClusterTwin, first: int, source: random.Random) -> None:
    route = None if first // BATCH % HANDED_OFF == 0 else Route("", "d0")
    requests = [asked(number, source, route) for number in range(first, first + BATCH)]
    await asyncio.gather(
        cancelled(twin, requests[0]), cancelled(twin, requests[1]), *(twin.collect(each) for each in requests[2:])
    )


async def test_ten_thousand_requests_leave_nothing_behind_in_the_controller_and_the_io_processes() -> None:
    source = random.Random(6)
    async with controller_with(1, 1, engine=SMALL) as (twin, _):
        for first in range(0, REQUESTS, BATCH):
            if first == WARM_UP:
                await twin.until(twin.idle, "idle")
                bytes_before, objects_before = held()
            await batch(twin, first, source)
        await twin.until(twin.idle, "idle")
        bytes_after, objects_after = held()
        assert bytes_after - bytes_before < ALLOWED_BYTES
        assert objects_after - objects_before < ALLOWED_OBJECTS
        await twin.until(lambda: all_free(twin), "every block free")
