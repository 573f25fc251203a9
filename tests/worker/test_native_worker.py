"""Real workers with the native engine over the shipped model: local, and prefill here, decode there, against transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin
from tests.worker.processes import NATIVE, ROOT
from tests.worker.test_handoffs import Pair

pytestmark = pytest.mark.slow  # real processes

MODEL = ROOT / "models" / "pdserve-tiny"
PROMPT = tuple((7 * position) % 500 + 20 for position in range(75))
NEW_TOKENS = 16
SETS = (f"model.path={MODEL}", "model.dtype=float32", "engine.threads=1", "engine.kv_bytes=16777216")


@pytest.fixture(scope="module")
def greedy() -> list[int]:
    """What transformers draws."""
    return reference(MODEL, PROMPT, NEW_TOKENS)


def reference(model_dir: Path, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def work(key: int, root: bytes, choices: tuple[int, ...] = (0,)) -> worker_pb2.Work:
    return commands.work(key, PROMPT, max_tokens=NEW_TOKENS, choices=choices, root=root)


async def test_a_local_generate_equals_transformers(
    controller: ControllerTwin, start_worker: StartWorker, greedy: list[int]
) -> None:
    await start_worker("d0", "decode", *SETS, engine_module=NATIVE)
    session = await controller.session("d0")
    total = session.snapshots[0].load.blocks_total
    root = session.snapshots[0].worker.identity.digest
    for key in (1, 2):  # the second one reuses the prefix
        session.send(commands.generate(work(key, root)))
        await session.until_finished(key)
        assert session.tokens(key)[0] == greedy
    assert session.of("started")[1].started.cached_tokens > 0
    await session.blocks_free(total)


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
async def test_prefill_here_and_decode_there_equal_transformers_for_every_choice(
    controller: ControllerTwin, start_worker: StartWorker, greedy: list[int], transport: str
) -> None:
    sets = (*SETS, "transfer.transport=auto", "engine.prefill_chunk=32")
    prefill = await start_worker("p0", "prefill", *sets, engine_module=NATIVE)
    decode = await start_worker("d0", "decode", *sets, engine_module=NATIVE)
    pair = Pair(await controller.session("p0"), await controller.session("d0"), decode, prefill)
    root = pair.decode.snapshots[0].worker.identity.digest
    await pair.start(work(1, root, (0, 1)), transport)
    await pair.decode.until_finished(1, 2)
    for choice in (0, 1):
        assert pair.prefill.tokens(1)[choice] + pair.decode.tokens(1)[choice] == greedy
    await pair.all_free()


async def test_cancel_in_the_middle_frees_every_block_of_both_engines(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    prefill = await start_worker("p0", "prefill", *SETS, engine_module=NATIVE)
    decode = await start_worker("d0", "decode", *SETS, engine_module=NATIVE)
    pair = Pair(await controller.session("p0"), await controller.session("d0"), decode, prefill)
    root = pair.decode.snapshots[0].worker.identity.digest
    for key in range(1, 9):
        endless = commands.work(key, PROMPT, max_tokens=150, root=root)
        await pair.start(endless)
        match key % 4:
            case 0:
                await pair.prefill.until_tokens(key, 1)
            case 1:
                await pair.decode.until_tokens(key, 1)
        for session in (pair.prefill, pair.decode):
            session.send(commands.cancel(key))
    await pair.all_free()


async def test_an_engine_is_bound_to_the_listed_cores_and_its_io_process_is_not(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)[:2]
    listed = f"engine.cores={','.join(map(str, cores))}"
    sets = tuple(setting for setting in SETS if not setting.startswith("engine.threads"))
    worker = await start_worker("d0", "decode", *sets, listed, engine_module=NATIVE)
    session = await controller.session("d0")
    snapshot = session.snapshots[0]
    session.send(commands.generate(work(1, snapshot.worker.identity.digest)))
    await session.until_finished(1)  # by then every thread of the engine has computed
    (engine_pid,) = children(worker.process.pid)
    bound = [mask for mask in thread_affinities(engine_pid) if len(mask) == 1]
    assert os.sched_getaffinity(engine_pid) == {cores[0]}
    assert set.union(*bound) == set(cores)
    assert os.sched_getaffinity(worker.process.pid) == allowed


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def thread_affinities(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()]
