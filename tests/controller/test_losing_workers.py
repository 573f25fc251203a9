"""Faults of workers: the streamed token ids equal those of an undisturbed run, and nothing is left over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pdserve.errors import NoDecodeWorkers, PdserveError, RequestQuarantined
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import PROMPT, ClusterTwin, Got, asked, cluster
from tests.controller.twin_tokens import tokens_of
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin


def expected(count: int, n: int = 1, seed: int = 3) -> dict[int, list[int]]:
    return {choice: tokens_of(PROMPT, seed, choice, count) for choice in range(n)}


async def disturbed(twin: ClusterTwin, count: int = 60, n: int = 1) -> Got:
    got = await twin.collect(asked(count, n=n, logprobs=1))
    assert got.token_ids == expected(count, n)
    for choice in range(n):
        assert [row.logprobs[0] for row in got.logprobs[choice]] == [-float(index) for index in range(count)]
    await twin.until(twin.idle, "idle")
    return got


def decodes(twin: ClusterTwin) -> list[WorkerTwin]:
    return [worker for worker in twin.workers.values() if DECODE in worker.roles]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_decode_worker_dies_mid_stream(n: int) -> None:
    async with cluster() as twin:
        await twin.square()
        twin.workers["d0"].faults.die_after_tokens = 20
        for _ in range(3):
            await disturbed(twin, n=n)
        assert not twin.workers["d0"].alive
        assert twin.state("d0") == "GONE"


async def test_a_prefill_worker_dies_while_it_computes() -> None:
    async with cluster() as twin:
        await twin.square()
        twin.workers["p0"].faults.die_at_prefill = True
        for _ in range(3):
            await disturbed(twin)
        assert not twin.workers["p0"].alive


async def test_a_prefill_worker_dies_after_its_first_token() -> None:
    async with cluster() as twin:
        await twin.square()
        twin.workers["p0"].faults.die_after_tokens = 1
        for _ in range(3):
            await disturbed(twin)


async def test_the_first_token_is_lost_with_its_worker_while_the_other_decodes_on() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            twin.workers[name].faults.hold_first_token_s = 30
        running = asyncio.create_task(disturbed(twin))
        await twin.until(lambda: any(worker.steps > 5 for worker in decodes(twin)), "decoding")
        holder = next(w for w in twin.workers.values() if any(c.HasField("prefill") for c in w.commands))
        other = "p1" if holder.worker_id == "p0" else "p0"
        twin.workers[other].faults.hold_first_token_s = 0
        await holder.kill()
        await running


async def test_all_prefill_workers_die_and_decode_workers_serve_alone() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            await twin.workers[name].kill()
        await twin.until(lambda: twin.state("p0") == twin.state("p1") == "GONE", "both gone")
        request = asked(20)
        assert (await twin.collect(request)).token_ids == expected(20)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert timeline.decisions[-1].reason == "last_resort"
        refusals = {each.refusal for each in timeline.decisions[-1].candidates}
        assert {"not_ready", "role_not_held"} <= refusals


async def test_everybody_dies_mid_stream_and_the_stream_ends_with_an_error() -> None:
    async with cluster(grace_s=0.3) as twin:
        await twin.square()
        got = Got()

        async def read() -> None:
            async for item in twin.service.generate(asked(3000)):
                got.add(item)
                if got.count >= 5:
                    await asyncio.gather(*(worker.kill() for worker in twin.workers.values()))

        with pytest.raises(NoDecodeWorkers):
            await asyncio.wait_for(read(), 10)
        assert got.token_ids[0] == expected(3000)[0][: got.count]
        await twin.until(lambda: not twin.service.live_requests, "ended")


async def test_a_worker_that_comes_back_takes_over_what_was_lost() -> None:
    async with cluster(grace_s=5) as twin:
        first = await twin.add(twin.twin("b0", PREFILL, DECODE))
        first.faults.die_after_tokens = 10
        running = asyncio.create_task(twin.collect(asked(40)))
        await twin.until(lambda: twin.state("b0") == "GONE", "gone")
        await twin.add(twin.twin("b0", PREFILL, DECODE))
        assert (await running).token_ids == expected(40)


async def test_a_restart_is_noticed_by_its_registration() -> None:
    async with cluster() as twin:
        old = await twin.add(twin.twin("b0", PREFILL, DECODE))
        running = asyncio.create_task(twin.collect(asked(300)))
        await twin.until(lambda: old.steps > 5, "decoding")
        await twin.add(twin.twin("b0", PREFILL, DECODE))
        assert (await running).token_ids == expected(300)
        await old.kill()


async def test_a_refused_reservation_goes_to_the_next_candidate() -> None:
    async with cluster() as twin:
        await twin.square()
        twin.workers["d0"].faults.refuse_reserves = 1
        twin.workers["d1"].faults.refuse_reserves = 1
        request = asked(20)
        assert (await twin.collect(request)).token_ids == expected(20)
        await twin.until(twin.idle, "idle")
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert [attempt.outcome for attempt in timeline.attempts][:1] == ["refused"]
        assert timeline.attempts[-1].outcome == "finished"


async def test_a_failed_hand_off_takes_another_pair_and_then_none() -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("p0", PREFILL))
        await twin.add(twin.twin("d0", DECODE))
        twin.workers["p0"].faults.fail_prefills = 5
        request = asked(20)
        assert (await twin.collect(request)).token_ids == expected(20)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert [attempt.kind for attempt in timeline.attempts] == ["split", "last_resort"]
        assert timeline.attempts[0].reason == "transfer_failed"
        await twin.until(twin.idle, "idle")


async def test_an_invalid_work_fails_without_another_try() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            twin.workers[name].faults.fail_prefills = 9
            twin.workers[name].faults.fail_reason = "context_length_exceeded"
        with pytest.raises(PdserveError) as caught:
            await twin.collect(asked(20))
        assert caught.value.reason == "context_length_exceeded"
        await twin.until(twin.idle, "idle")


async def test_duplicates_and_reordered_batches_change_nothing() -> None:
    async with cluster() as twin:
        await twin.square()
        for worker in twin.workers.values():
            worker.faults.duplicate = worker.faults.reorder = True
        results = await asyncio.gather(*(disturbed_quietly(twin, n) for n in (1, 2, 3)))
        assert len(results) == 3
        await twin.until(twin.idle, "idle")


async def disturbed_quietly(twin: ClusterTwin, n: int) -> Got:
    got = await twin.collect(asked(40, n=n))
    assert got.token_ids == expected(40, n)
    return got


async def test_a_first_token_later_than_those_of_the_decode_worker_keeps_its_place() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            twin.workers[name].faults.hold_first_token_s = 0.1
        await disturbed(twin, 60, n=2)


async def test_a_first_token_later_than_the_last_one_leaves_no_stage_out() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            twin.workers[name].faults.hold_first_token_s = 0.3
        request = asked(3)
        assert (await twin.collect(request)).token_ids == expected(3)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert [stage.name for stage in timeline.stages] == ["queue", "reserve", "prefill", "transfer", "decode"]
        await twin.until(twin.idle, "idle")


async def test_a_lost_activation_report_does_not_matter() -> None:
    async with cluster() as twin:
        await twin.square()
        for worker in twin.workers.values():
            worker.faults.swallow_activation_report = True
        await disturbed(twin)


async def test_a_broken_stream_is_redialled_and_replayed_without_a_new_attempt() -> None:
    async with cluster() as twin:
        worker = await twin.add(twin.twin("b0", PREFILL, DECODE))
        worker.faults.reset_after_tokens = 15
        request = asked(200)
        assert (await twin.collect(request)).token_ids == expected(200)
        assert worker.session is not None
        assert worker.session.opened == 2
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert len(timeline.attempts) == 1


async def test_a_command_that_a_broken_stream_swallowed_is_found_out() -> None:
    async with cluster() as twin:
        worker = await twin.add(twin.twin("b0", PREFILL, DECODE))
        running = asyncio.create_task(twin.collect(asked(300)))
        await twin.until(lambda: bool(worker.runs), "running")
        worker.runs.clear()  # as if the command had never come
        worker.break_stream()
        assert (await running).token_ids == expected(300)


async def test_a_silent_worker_is_dead_after_three_heartbeats() -> None:
    async with cluster() as twin:
        await twin.square()
        running = asyncio.create_task(disturbed(twin, 300))
        await twin.until(lambda: any(worker.runs for worker in decodes(twin)), "decoding")
        worker = next(worker for worker in decodes(twin) if worker.runs)
        worker.faults.silent = True
        await twin.until(lambda: twin.state(worker.worker_id) == "GONE", "gone")
        worker.runs.clear()
        await running


async def test_what_a_returning_worker_still_holds_of_us_is_cancelled() -> None:
    async with cluster() as twin:
        worker = await twin.add(twin.twin("b0", PREFILL, DECODE))
        await twin.add(twin.twin("b1", PREFILL, DECODE))
        stale, foreign = (7 << 32) + 999, (8 << 32) + 999
        for key in (stale, foreign):
            work = worker_pb2.Work(token_ids=PROMPT, prompt_tokens=50)
            work.dispatch.request_key, work.dispatch.attempt = key, 1
            worker.reserved[key, 1] = work
        worker.break_stream()
        await twin.until(lambda: (stale, 1) not in worker.reserved, "ours cancelled")
        assert (foreign, 1) in worker.reserved, "another controller's is left alone"
        worker.reserved.clear()


async def test_a_prompt_that_kills_two_workers_is_not_tried_on_a_third() -> None:
    async with cluster() as twin:
        for name in ("b0", "b1", "b2"):
            worker = await twin.add(twin.twin(name, PREFILL, DECODE))
            worker.faults.die_at_prefill = True
        with pytest.raises(RequestQuarantined):
            await twin.collect(asked(20))
        assert sum(worker.alive for worker in twin.workers.values()) == 1


async def test_a_split_prompt_that_kills_two_prefill_workers_is_quarantined() -> None:
    async with cluster() as twin:
        await twin.square()
        await twin.add(twin.twin("p2", PREFILL))
        for name in ("p0", "p1", "p2"):
            twin.workers[name].faults.die_at_prefill = True
        with pytest.raises(RequestQuarantined):
            await twin.collect(asked(20))
        assert sum(twin.workers[name].alive for name in ("p0", "p1", "p2")) == 1
        await twin.until(twin.idle, "idle")


async def test_one_death_counts_once_though_it_cost_a_request_two_attempts() -> None:
    """The decode worker tells of the broken hand-off first; the next attempt still goes to the dying worker."""
    async with cluster() as twin:
        await twin.add(twin.twin("p0", PREFILL))
        for name in ("d0", "d1"):
            await twin.add(twin.twin(name, DECODE))
        twin.workers["p0"].faults.fail_prefills = 1
        twin.workers["p0"].faults.die_at_prefill = True
        request = asked(20)
        assert (await twin.collect(request)).token_ids == expected(20)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert [attempt.prefill_worker for attempt in timeline.attempts][:2] == ["p0", "p0"]
        assert timeline.attempts[-1].outcome == "finished"


async def test_workers_that_fall_silent_do_not_quarantine_the_prompt_they_computed() -> None:
    """An overloaded machine makes workers silent, whatever they compute."""
    async with cluster(patience=1.0, grace_s=10.0) as twin:
        for name in ("b0", "b1", "b2"):
            worker = await twin.add(twin.twin(name, PREFILL, DECODE))
            if name != "b2":
                worker.faults.hang_engine = worker.faults.silent = True
        request = asked(20)
        assert (await twin.collect(request)).token_ids == expected(20)


async def test_text_and_stop_strings_survive_a_loss() -> None:
    async with cluster() as twin:
        await twin.square()
        whole = bytes(tokens_of(PROMPT, 3, 0, 60)).decode()
        twin.workers["d0"].faults.die_after_tokens = 15
        twin.workers["d1"].faults.die_after_tokens = 15
        await twin.add(twin.twin("d2", DECODE))
        got = await twin.collect(replace(asked(60), stop=(whole[30:36],)))
        assert got.text[0] == whole[: whole.index(whole[30:36])]


async def test_many_streams_survive_a_storm_of_deaths() -> None:
    async with cluster(grace_s=10) as twin:
        await twin.square()
        streams = [asyncio.create_task(twin.collect(asked(120, n=1 + seed % 3, seed=seed))) for seed in range(40)]
        # One prefill worker alone: on a slow machine a prompt may be in prefill at two deaths, and is quarantined by right.
        for name in ("d0", "p0", "d1", "d0"):
            steps = sum(worker.steps for worker in decodes(twin))
            await twin.until(lambda s=steps: sum(w.steps for w in decodes(twin)) > s + 10, "progress")  # type: ignore[misc]
            await twin.workers[name].kill()
            await twin.until(lambda n=name: twin.state(n) == "GONE", "gone")  # type: ignore[misc]
            await twin.add(twin.twin(name, DECODE if name[0] == "d" else PREFILL))
        for seed, got in enumerate(await asyncio.gather(*streams)):
            assert got.token_ids == expected(120, 1 + seed % 3, seed)
        await twin.until(twin.idle, "idle")


async def test_a_reservation_that_is_not_answered_goes_to_the_next_candidate() -> None:
    async with cluster() as twin:
        await twin.square()
        twin.workers["d0"].faults.ignore_reserves = True
        for _ in range(4):
            assert (await twin.collect(asked(10))).token_ids == expected(10)
        await twin.until(twin.idle, "idle")


async def test_a_hung_engine_is_seen_though_its_worker_still_talks() -> None:
    async with cluster() as twin:
        await twin.square()
        running = asyncio.create_task(twin.collect(asked(600)))
        await twin.until(lambda: any(worker.steps > 5 for worker in decodes(twin)), "decoding")
        worker = next(worker for worker in decodes(twin) if worker.runs)
        worker.faults.hang_engine = True
        assert (await running).token_ids == expected(600)
        assert twin.state(worker.worker_id) == "READY"
        await twin.until(twin.idle, "idle")


async def test_a_hand_off_that_hangs_at_a_prefill_worker_that_dies_is_done_again() -> None:
    async with cluster() as twin:
        await twin.square()
        for name in ("p0", "p1"):
            twin.workers[name].faults.hold_activation_s = 30
        got, stream = Got(), twin.service.generate(asked(40))
        async for item in stream:
            got.add(item)
            if got.count == 1:
                break
        assert not any(worker.runs for worker in decodes(twin)), "the first token came before the hand-off ended"
        holder = next(w for w in twin.workers.values() if any(c.HasField("prefill") for c in w.commands))
        other = "p1" if holder.worker_id == "p0" else "p0"
        twin.workers[other].faults.hold_activation_s = 0
        await holder.kill()
        async for item in stream:
            got.add(item)
        assert got.token_ids == expected(40)
        await twin.until(twin.idle, "idle")
