"""Real workers keep the KV that left the device: the next prompt finds it in a tier and the answer is the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import redis

from kv_transfer.keys import HASH_BYTES, chain_hashes
from pdserve.v1 import worker_pb2
from tests.kv_store.redis_server import running_redis
from tests.refused_calls import filtered
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin, SessionTwin
from tests.worker.failing_disk_child import READS_BREAK, WRITES_BREAK
from tests.worker.processes import NATIVE
from tests.worker.test_handoffs import Pair
from tests.worker.test_native_worker import MODEL

pytestmark = pytest.mark.slow  # real processes

SETS = (f"model.path={MODEL}", "model.dtype=float32", "engine.threads=1", "engine.kv_bytes=2000000")
LENGTH = 200
FULL_PAGES = LENGTH // 16
NEW_TOKENS = 8
PAGE_BYTES, HOST_PAGES = 16 * 4 * 2 * 2 * 64 * 4, 16  # 4 layers, K and V, 2 heads of 64, float32; less than two prompts
FAILING_DISK = "tests.worker.failing_disk_child"
AGAIN = 99


def prompt(number: int) -> tuple[int, ...]:
    return tuple((number * 131 + 7 * position) % 500 + 20 for position in range(LENGTH))


def work(key: int, root: bytes, number: int) -> worker_pb2.Work:
    return commands.work(key, prompt(number), max_tokens=NEW_TOKENS, root=root)


def held(session: SessionTwin, tier: str) -> set[bytes]:
    """The keys of a tier, by the events so far."""
    keys: set[bytes] = set()
    for event in (event for message in session.kv for event in message.events):
        cut = {event.block_hashes[at : at + HASH_BYTES] for at in range(0, len(event.block_hashes), HASH_BYTES)}
        if event.kind == worker_pb2.KvEvent.KIND_CLEARED:
            keys = set()
        elif event.tier == tier:
            keys = keys | cut if event.kind == worker_pb2.KvEvent.KIND_STORED else keys - cut
    return keys


def keys_of(root: bytes, number: int) -> set[bytes]:
    packed = chain_hashes(root, commands.work(1, prompt(number), root=root).token_ids)
    return {packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)}


async def evict(session: SessionTwin, root: bytes, number: int, first_key: int) -> None:
    """Computes other prompts until the device has forgotten the first page of prompt `number`."""
    wanted = chain_hashes(root, commands.work(1, prompt(number), root=root).token_ids)[:HASH_BYTES]
    key = first_key
    while wanted in held(session, "device"):
        session.send(commands.generate(work(key, root, number + key)))
        await session.until_finished(key)
        await session.until_next_load()
        key += 1


async def test_a_prompt_that_left_the_device_is_loaded_from_the_host_tier(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", *SETS, engine_module=NATIVE)
    session = await controller.session("d0")
    root = session.snapshots[0].worker.identity.digest
    session.send(commands.generate(work(1, root, 0)))
    await session.until_finished(1)
    await session.until(lambda: keys_of(root, 0) <= held(session, "host"))
    await evict(session, root, 0, 100)
    session.send(commands.generate(work(2, root, 0)))
    await session.until_finished(2)
    assert session.of("started")[-1].started.cached_tokens == 16 * FULL_PAGES
    assert session.tokens(2) == session.tokens(1)


async def test_a_prefill_loads_what_it_has_and_hands_everything_over(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    prefill = await start_worker("p0", "prefill,decode", *SETS, engine_module=NATIVE)
    decode = await start_worker("d0", "decode", *SETS, engine_module=NATIVE)
    pair = Pair(await controller.session("p0"), await controller.session("d0"), decode, prefill)
    root = pair.decode.snapshots[0].worker.identity.digest
    pair.prefill.send(commands.generate(work(1, root, 0)))
    await pair.prefill.until_finished(1)
    await pair.prefill.until(lambda: keys_of(root, 0) <= held(pair.prefill, "host"))
    await evict(pair.prefill, root, 0, 100)
    await pair.start(work(2, root, 0), "tcp")
    await pair.decode.until_finished(2)
    assert pair.prefill.of("started")[-1].started.cached_tokens == 16 * FULL_PAGES
    assert pair.prefill.tokens(2)[0] + pair.decode.tokens(2)[0] == pair.prefill.tokens(1)[0]
    await pair.all_free()


async def test_what_went_to_disk_is_found_after_everything_was_killed(
    controller: ControllerTwin, start_worker: StartWorker, tmp_path: Path
) -> None:
    sets = on_disk(tmp_path)
    session, root = await fill_the_disk(controller, start_worker, sets)
    await start_worker("d0", "decode", *sets, engine_module=NATIVE)
    again = await controller.session("d0")
    await again.until(lambda: keys_of(root, 0) <= held(again, "disk"))
    assert not held(again, "device")
    again.send(commands.generate(work(2, root, 0)))
    await again.until_finished(2)
    assert again.of("started")[-1].started.cached_tokens == 16 * FULL_PAGES
    assert again.tokens(2) == session.tokens(1)


Damage = Callable[[Path], None]


def flip_pages(disk: Path) -> None:
    """A bit of the first page of every segment."""
    for path in segments(disk):
        data = bytearray(path.read_bytes())
        data[4096 + 2000] ^= 4
        path.write_bytes(data)


def truncate_the_first(disk: Path) -> None:
    path = segments(disk)[0]
    os.truncate(path, path.stat().st_size // 3)


def swap_two(disk: Path) -> None:
    first, second, *_ = segments(disk)
    first.rename(disk / "aside")
    second.rename(first)
    (disk / "aside").rename(second)


def segments(disk: Path) -> list[Path]:
    return sorted(disk.rglob("segment-*"))


async def test_a_damaged_disk_costs_pages_and_time_while_the_answer_stays_the_same_and_a_counter_tells_it(
    controller: ControllerTwin, start_worker: StartWorker, tmp_path: Path
) -> None:
    """One disk, filled by a worker that was killed, copied and damaged in a way of its own for each of the workers that follow."""
    damages: dict[str, Damage] = {"checksum": flip_pages, "length": truncate_the_first, "identity": swap_two}
    sets = (*on_disk(tmp_path), "store.disk_bytes=12000000")
    before, root = await fill_the_disk(controller, start_worker, sets, prompts=2)
    assert len(segments(tmp_path / "state")) >= 2
    for kind, damage in damages.items():
        damage(shutil.copytree(tmp_path / "state" / "kv" / "d0", tmp_path / "state" / "kv" / kind))
        await start_worker(kind, "decode", *sets, engine_module=NATIVE)
    for kind in damages:
        session = await controller.session(kind)
        for key, number in ((1, 0), (2, 1)):
            session.send(commands.generate(work(key, root, number)))
            await session.until_finished(key)
            assert session.tokens(key) == before.tokens(key), kind
        cached = [event.started.cached_tokens for event in session.of("started")]
        assert sum(cached) < 2 * 16 * FULL_PAGES, kind
        report = tier_of(await fresh_load(session), "disk")
        assert report.verify_failures[kind] > 0, report


async def test_a_disk_whose_system_calls_fail_changes_no_answer_holds_nothing_up_and_a_counter_tells_it(
    controller: ControllerTwin, start_worker: StartWorker, tmp_path: Path
) -> None:
    """EIO by the kernel, of reads to one worker and of writes to the other, once both have pages on disk. A third one, without tiers,
    says what is right. What was on disk by then is there after a restart."""
    sets = (*on_disk(tmp_path), f"store.host_bytes={HOST_PAGES * PAGE_BYTES}", "store.eviction=lru")
    breaks = {"reads": READS_BREAK, "writes": WRITES_BREAK}
    workers = {
        name: await start_worker(name, "decode", *sets, engine_module=NATIVE, module=FAILING_DISK) for name in breaks
    }
    await start_worker("right", "decode", *SETS, "store.host_bytes=0", engine_module=NATIVE)
    right = await controller.session("right")
    root = right.snapshots[0].worker.identity.digest
    await ask(right, root, 0, 1, 2, 3)
    for name, worker in workers.items():
        session = await controller.session(name)
        await ask_and_store(session, root, 0, 1)
        stored = tier_of(await fresh_load(session), "disk").stored
        worker.process.send_signal(breaks[name])
        await session.until(lambda: filtered(worker.process.pid))  # noqa: B023 (called at once)
        await (ask_and_store if name == "reads" else ask)(session, root, 2, 3)
        await leave_to_the_disk(session, root, 0)
        session.send(commands.generate(work(AGAIN, root, 0)))
        await session.until_finished(AGAIN)
        assert [session.tokens(key) for key in (1, 2, 3, 4, AGAIN)] == [right.tokens(key) for key in (1, 2, 3, 4, 1)]
        assert session.of("started")[-1].started.cached_tokens == (0 if name == "reads" else 16 * FULL_PAGES)
        await session.until(lambda: tier_of(session.loads[-1], "disk").failures)  # noqa: B023
        assert (tier_of(await fresh_load(session), "disk").stored > stored) == (name == "reads")
        worker.process.kill()
        await worker.exit_code()
    controller.workers.clear()
    for name in breaks:
        await start_worker(name, "decode", *sets, engine_module=NATIVE)
    for name in breaks:
        again = await controller.session(name)
        await again.until(lambda: keys_of(root, 1) <= held(again, "disk"))  # noqa: B023
        await ask(again, root, 1)
        assert again.of("started")[-1].started.cached_tokens == 16 * FULL_PAGES
        assert again.tokens(2) == right.tokens(2)
        assert not tier_of(await fresh_load(again), "disk").verify_failures


async def ask_and_store(session: SessionTwin, root: bytes, *numbers: int) -> None:
    """One after the other, since pages that leave host memory before their turn do not go to the disk."""
    for number in numbers:
        await ask(session, root, number)
        await session.until(lambda: keys_of(root, number) <= held(session, "disk"))  # noqa: B023 (called at once)


async def leave_to_the_disk(session: SessionTwin, root: bytes, number: int) -> None:
    """Computes other prompts until neither the device nor host memory has a page of prompt `number`."""
    other = 200
    while keys_of(root, number) & (held(session, "device") | held(session, "host")):
        await ask(session, root, other)
        await session.until_next_load()
        other += 1


async def ask(session: SessionTwin, root: bytes, *numbers: int) -> None:
    """The work of prompt n has the key n + 1."""
    for number in numbers:
        session.send(commands.generate(work(number + 1, root, number)))
        await session.until_finished(number + 1)


async def fresh_load(session: SessionTwin) -> worker_pb2.LoadReport:
    """One whose figures are surely of now."""
    for _ in range(3):
        await session.until_next_load()
    return session.loads[-1]


def tier_of(load: worker_pb2.LoadReport, name: str) -> worker_pb2.TierReport:
    (report,) = (tier for tier in load.tiers if tier.tier == name)
    return report


def on_disk(place: Path) -> tuple[str, ...]:
    return (*SETS, "store.disk_bytes=200000000", f"state_dir={place / 'state'}")


async def fill_the_disk(
    controller: ControllerTwin, start_worker: StartWorker, sets: tuple[str, ...], prompts: int = 1
) -> tuple[SessionTwin, bytes]:
    """A worker whose pages went to its disk and that was killed then: its session, and the root of its keys. The work of prompt n
    has the key n + 1."""
    worker = await start_worker("d0", "decode", *sets, engine_module=NATIVE)
    session = await controller.session("d0")
    root = session.snapshots[0].worker.identity.digest
    for number in range(prompts):
        session.send(commands.generate(work(number + 1, root, number)))
        await session.until_finished(number + 1)
        await session.until(lambda: keys_of(root, number) <= held(session, "disk"))  # noqa: B023 (called at once)
    worker.process.kill()
    await worker.exit_code()
    controller.workers.clear()
    return session, root


async def test_workers_share_pages_through_redis_and_serve_on_when_it_stands_still_or_dies(
    controller: ControllerTwin, start_worker: StartWorker, tmp_path: Path
) -> None:
    with running_redis(tmp_path) as server:
        sets = (*SETS, f"store.redis_url={server.url}")
        await start_worker("d0", "decode", *sets, engine_module=NATIVE)
        await start_worker("d1", "decode", *sets, engine_module=NATIVE)
        first, second = await controller.session("d0"), await controller.session("d1")
        for number in range(6):
            await answered(first, number)
        with redis.Redis.from_url(server.url) as asker:
            await first.until(lambda: len(asker.keys("*")) >= 6 * FULL_PAGES)
        for number in range(4):  # a good Redis, too, may answer too late on a busy machine, and is then left alone
            assert await answered(second, number) == first.tokens(number)
            cached = second.of("started")[-1].started.cached_tokens
            if cached == 16 * FULL_PAGES:
                break
            await fresh_load(second)
        assert cached == 16 * FULL_PAGES
        server.freeze()
        assert await answered(second, 4) == first.tokens(4)
        server.thaw()
        server.kill()
        assert await answered(second, 5) == first.tokens(5)


async def test_a_redis_that_is_damaged_emptied_full_or_late_changes_no_answer_and_a_counter_tells_it(
    controller: ControllerTwin, start_worker: StartWorker, tmp_path: Path
) -> None:
    """d0 computes each prompt and saves it; d1 is asked for the same one once Redis was tampered with."""
    with running_redis(tmp_path) as server, redis.Redis.from_url(server.url) as asker:
        for name in ("d0", "d1"):
            await start_worker(name, "decode", *SETS, f"store.redis_url={server.url}", engine_module=NATIVE)
        first, second = await controller.session("d0"), await controller.session("d1")
        for number in range(4):
            await answered(first, number)
        await first.until(lambda: len(asker.keys("*")) >= 4 * FULL_PAGES)

        flip_values(asker)
        for number in range(3):  # a good Redis, too, may answer too late on a busy machine, and is then left alone
            assert await answered(second, number) == first.tokens(number)
            damaged = sum(tier_of(await fresh_load(second), "redis").verify_failures.values())
            if damaged:
                break
        assert damaged

        asker.flushall()
        before = (await fresh_load(second)).loads
        assert await answered(second, 3) == first.tokens(3)
        after = (await fresh_load(second)).loads
        assert after.queried_tokens - before.queried_tokens == 16 * FULL_PAGES
        assert after.loaded_tokens["redis"] == before.loaded_tokens["redis"]

        asker.config_set("maxmemory", 1)
        dropped = tier_of(await fresh_load(first), "redis").dropped
        await answered(first, 4)
        await first.until(lambda: tier_of(first.loads[-1], "redis").dropped >= dropped + FULL_PAGES)
        assert await answered(second, 4) == first.tokens(4)

        asker.client_pause(600_000, all=True)  # it takes commands and answers in ten minutes
        failures = tier_of(await fresh_load(second), "redis").failures
        await answered(first, 5)
        assert await answered(second, 5) == first.tokens(5)
        await second.until(lambda: tier_of(second.loads[-1], "redis").failures > failures)


async def answered(session: SessionTwin, number: int) -> dict[int, list[int]]:
    """The tokens of prompt `number`, whose work has the key `number`."""
    session.send(commands.generate(work(number, session.snapshots[0].worker.identity.digest, number)))
    await session.until_finished(number)
    return session.tokens(number)


def flip_values(asker: redis.Redis) -> None:
    for name in asker.keys("*"):
        value = bytearray(cast(bytes, asker.get(name)))
        value[-1] ^= 4
        asker.set(name, bytes(value), keepttl=True)
