"""Blended work through real workers: chunks are computed once, handed over with the prompt, and found in the tiers again."""

from __future__ import annotations

from array import array

import pytest

from kv_transfer.keys import chunk_hashes
from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin
from tests.worker.processes import NATIVE
from tests.worker.test_handoffs import Pair
from tests.worker.test_tiers import SETS, held
from tests.worker.test_tiers import work as exact_work

pytestmark = pytest.mark.slow  # real processes

CHUNKS = [tuple((number * 37 + 11 * at) % 500 + 20 for at in range(60 + number)) for number in range(2)]
NEW_TOKENS = 8


def work(key: int, root: bytes, order: tuple[int, ...]) -> worker_pb2.Work:
    prompt: list[int] = []
    chunks: list[worker_pb2.Chunk] = []
    for number in order:
        prompt.append(40 + number)
        content = array("i", CHUNKS[number]).tobytes()
        chunks.append(worker_pb2.Chunk(start=len(prompt), count=len(CHUNKS[number]), keys=chunk_hashes(root, content)))
        prompt += CHUNKS[number]
    made = commands.work(key, [*prompt, 30, 31, 32], max_tokens=NEW_TOKENS, root=root)
    made.block_hashes = b""
    made.chunks.extend(chunks)
    made.blend.CopyFrom(worker_pb2.Blend(method=worker_pb2.Blend.METHOD_BLEND, ratio=0.15))
    return made


def chunk_keys(root: bytes) -> set[bytes]:
    packed = b"".join(chunk_hashes(root, array("i", chunk).tobytes()) for chunk in CHUNKS)
    return {packed[at : at + 32] for at in range(0, len(packed), 32)}


async def test_blended_kv_is_handed_over_and_its_chunks_come_back_from_the_host_tier(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    prefill = await start_worker("p0", "prefill,decode", *SETS, engine_module=NATIVE)
    decode = await start_worker("d0", "decode", *SETS, engine_module=NATIVE)
    pair = Pair(await controller.session("p0"), await controller.session("d0"), decode, prefill)
    root = pair.decode.snapshots[0].worker.identity.digest
    pair.prefill.send(commands.generate(work(1, root, (0, 1))))
    await pair.prefill.until_finished(1)
    alone = pair.prefill.of("started")[0].started
    assert alone.blended_tokens == sum(map(len, CHUNKS))
    await pair.prefill.until(lambda: chunk_keys(root) <= held(pair.prefill, "host"))
    await evict_chunks(pair, root)
    await pair.start(work(2, root, (0, 1)), "tcp")
    await pair.decode.until_finished(2)
    assert pair.prefill.of("started")[-1].started.blended_tokens == sum(map(len, CHUNKS))
    assert pair.prefill.tokens(2)[0] + pair.decode.tokens(2)[0] == pair.prefill.tokens(1)[0]
    assert chunk_keys(root).isdisjoint(held(pair.decode, "device"))
    await pair.all_free()


async def evict_chunks(pair: Pair, root: bytes) -> None:
    """Computes other prompts until the device has forgotten every chunk."""
    key = 100
    while chunk_keys(root) & held(pair.prefill, "device"):
        pair.prefill.send(commands.generate(exact_work(key, root, key)))
        await pair.prefill.until_finished(key)
        await pair.prefill.until_next_load()
        key += 1
