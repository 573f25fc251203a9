"""Requests through real sessions to scripted workers, undisturbed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controller.request import Begun, Delta
from pdserve.errors import DeadlineExceeded, InvalidRequest, NoDecodeWorkers, Overloaded, PromptTooLong
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import PROMPT, Got, asked, cluster
from tests.controller.twin_tokens import tokens_of
from tests.controller.worker_twin import DECODE, PREFILL


async def test_a_request_is_prefilled_by_one_worker_and_decoded_by_another() -> None:
    async with cluster() as twin:
        await twin.square()
        request = asked(20)
        got = await twin.collect(request)
        assert got.token_ids == {0: tokens_of(PROMPT, 3, 0, 20)}
        assert got.text[0] == bytes(tokens_of(PROMPT, 3, 0, 20)).decode()
        assert got.finish == {0: "length"}
        assert got.begun == Begun(16)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        picked = timeline.decisions[-1].picked
        assert picked is not None
        assert (picked.kind, picked.prefill_worker[0], picked.decode_worker[0]) == ("split", "p", "d")
        assert [stage.name for stage in timeline.stages] == ["queue", "reserve", "prefill", "transfer", "decode"]
        assert timeline.summary.state == "FINISHED"
        assert timeline.attempts[0].kv_bytes == 1000
        await twin.until(twin.idle, "idle")


async def test_choices_share_one_prefill_and_draw_by_their_own_number() -> None:
    async with cluster() as twin:
        await twin.square()
        got = await twin.collect(asked(15, n=3, seed=9))
        assert got.token_ids == {choice: tokens_of(PROMPT, 9, choice, 15) for choice in range(3)}
        prefills = [
            command for worker in twin.workers.values() for command in worker.commands if command.HasField("prefill")
        ]
        assert len(prefills) == 1
        assert list(prefills[0].prefill.work.choices) == [0, 1, 2]
        await twin.until(twin.idle, "idle")


async def test_a_worker_with_both_roles_computes_alone() -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("b0", PREFILL, DECODE))
        request = asked(5)
        got = await twin.collect(request)
        assert got.token_ids == {0: tokens_of(PROMPT, 3, 0, 5)}
        assert [command.WhichOneof("command") for command in twin.workers["b0"].commands] == ["generate"]
        await twin.until(twin.idle, "idle")


async def test_a_first_token_that_is_the_last_frees_the_reservation() -> None:
    async with cluster() as twin:
        await twin.square()
        got = await twin.collect(asked(1, n=2))
        assert got.count == 2
        await twin.until(twin.idle, "idle")


async def test_block_keys_and_seed_travel_with_the_work() -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("b0", PREFILL, DECODE))
        await twin.collect(asked(2, seed=-1))
        work = twin.workers["b0"].commands[0].generate.work
        assert work.sampling.seed == 2**64 - 1
        assert len(work.block_hashes) == 3 * 32  # 50 tokens
        assert work.prompt_tokens == 50


async def test_a_stop_string_ends_the_choice_and_cancels_it_at_the_worker() -> None:
    async with cluster() as twin:
        await twin.square()
        whole = bytes(tokens_of(PROMPT, 3, 0, 200)).decode()
        stop = whole[10:13]
        got = await twin.collect(asked(2000, stop=(stop, "never there")))
        assert got.text[0] == whole[: whole.index(stop)]
        assert got.finish == {0: "stop"}
        assert got.stop_reason == {0: stop}
        await twin.until(twin.idle, "idle")


async def test_a_stop_string_of_one_choice_leaves_the_others() -> None:
    async with cluster() as twin:
        await twin.square()
        texts = [bytes(tokens_of(PROMPT, 3, choice, 60)).decode() for choice in range(3)]
        stop = texts[1][20:24]
        got = await twin.collect(asked(60, n=3, stop=(stop,)))
        assert got.text[1] == texts[1][: texts[1].index(stop)]
        assert [got.text[0], got.text[2]] == [texts[0], texts[2]]
        await twin.until(twin.idle, "idle")


async def test_a_stop_id_is_named_and_is_no_text() -> None:
    async with cluster() as twin:
        await twin.square()
        ids = tokens_of(PROMPT, 3, 0, 60)
        request = asked(60)
        request = replace(request, sampling=replace(request.sampling, stop_token_ids=(ids[30],)))
        got = await twin.collect(request)
        end = ids.index(ids[30]) + 1
        assert got.token_ids[0] == ids[:end]
        assert got.text[0] == bytes(ids[: end - 1]).decode()
        assert got.stop_reason == {0: ids[30]}


async def test_logprobs_and_prompt_logprobs_come_once_and_in_order() -> None:
    async with cluster() as twin:
        await twin.square()
        request = asked(12, logprobs=1)
        request = replace(request, sampling=replace(request.sampling, prompt_logprobs=0))
        got = await twin.collect(request)
        assert got.begun is not None
        assert len(got.begun.prompt_logprobs) == 49
        assert [row.logprobs[0] for row in got.logprobs[0]] == [-float(index) for index in range(12)]


async def test_a_hundred_streams_at_once_each_get_their_own_tokens() -> None:
    async with cluster() as twin:
        await twin.square()
        results = await asyncio.gather(*(twin.collect(asked(30, seed=seed)) for seed in range(100)))
        assert [got.token_ids[0] for got in results] == [tokens_of(PROMPT, seed, 0, 30) for seed in range(100)]
        await twin.until(twin.idle, "idle")


async def test_a_slow_reader_holds_up_nobody_and_misses_nothing() -> None:
    async with cluster() as twin:
        await twin.square()
        slow = twin.service.generate(asked(300, seed=1))
        got = Got()
        got.add(await anext(slow))
        quick = await twin.collect(asked(50, seed=2))
        assert quick.count == 50
        await twin.until(lambda: twin.service.live_requests == 0, "the slow one's request computed to its end")
        deltas = 0
        async for item in slow:
            deltas += isinstance(item, Delta)
            got.add(item)
        assert got.token_ids[0] == tokens_of(PROMPT, 1, 0, 300)
        assert deltas <= 2, "what piled up comes at once"


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_closing_the_stream_cancels_in_every_worker(after: int) -> None:
    async with cluster() as twin:
        await twin.square()
        stream = twin.service.generate(asked(3000, n=2))
        if after == 0:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for _ in range(after):
            await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await twin.until(twin.idle, "idle")


async def test_cancel_by_id_ends_the_stream_with_its_reason_and_is_idempotent() -> None:
    async with cluster() as twin:
        await twin.square()
        request, got, found = asked(3000), Got(), list[bool]()
        async for item in twin.service.generate(request):
            got.add(item)
            if got.count >= 5 and not found:
                found = [await twin.service.cancel(request.request_id) for _ in range(2)]
        assert found == [True, False]
        assert got.finish == {0: "cancelled"}
        assert not await twin.service.cancel("nobody")
        await twin.until(twin.idle, "idle")


async def test_without_workers_the_answer_is_503_within_the_grace() -> None:
    async with cluster(grace_s=0.2, queue_timeout_s=50.0, request_timeout_s=100.0) as twin:
        began = asyncio.get_running_loop().time()
        with pytest.raises(NoDecodeWorkers) as caught:
            await twin.collect(asked())
        assert asyncio.get_running_loop().time() - began < 20.0
        assert caught.value.retry_after_s


async def test_a_worker_that_comes_within_the_grace_serves_the_waiting() -> None:
    async with cluster(grace_s=10) as twin:
        waiting = asyncio.create_task(twin.collect(asked(5)))
        await twin.until(lambda: twin.service.queued == 1, "waiting")
        await twin.add(twin.twin("b0", PREFILL, DECODE))
        assert (await waiting).count == 5


async def test_a_full_queue_refuses_at_once() -> None:
    async with cluster(queue_limit=2, grace_s=5) as twin:
        waiting = [asyncio.create_task(twin.collect(asked())) for _ in range(2)]
        await twin.until(lambda: twin.service.queued == 2, "waiting")
        with pytest.raises(Overloaded) as caught:
            await twin.collect(asked())
        assert caught.value.retry_after_s
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await twin.until(twin.idle, "idle")


async def test_work_beyond_the_batch_waits_for_its_turn_by_priority() -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("b0", PREFILL, DECODE, max_batch=1))
        running = asyncio.create_task(twin.collect(asked(50)))
        await twin.until(lambda: twin.service.live_requests == 1, "one runs")
        order: list[str] = []

        async def note(name: str, priority: int) -> None:
            await twin.collect(replace(asked(2), priority=priority))
            order.append(name)

        late = [asyncio.create_task(note("low", 5)), asyncio.create_task(note("high", -5))]
        await twin.until(lambda: twin.service.queued == 2, "both wait")
        await asyncio.gather(running, *late)
        assert order == ["high", "low"]


async def test_waiting_too_long_is_a_deadline() -> None:
    async with cluster(queue_timeout_s=0.3) as twin:
        await twin.add(twin.twin("b0", PREFILL, DECODE, max_batch=1))
        running = asyncio.create_task(twin.collect(asked(2000)))
        await twin.until(lambda: twin.service.live_requests == 1, "one runs")
        with pytest.raises(DeadlineExceeded):
            await twin.collect(asked())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_deadline_of_a_request_ends_its_wait_for_a_worker() -> None:
    async with cluster(grace_s=30.0) as twin:
        with pytest.raises(DeadlineExceeded):
            await twin.collect(replace(asked(), timeout_s=0.2))
        assert twin.service.queued == 0


async def test_the_deadline_of_a_request_ends_it_everywhere() -> None:
    async with cluster() as twin:
        await twin.square()
        with pytest.raises(DeadlineExceeded):
            await twin.collect(replace(asked(3000), timeout_s=0.2))
        await twin.until(twin.idle, "idle")


async def test_a_prompt_that_fits_nowhere_is_refused_with_both_numbers() -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("b0", PREFILL, DECODE, max_context=64))
        with pytest.raises(PromptTooLong, match=r"64 tokens.*needs 70"):
            await twin.collect(asked(20))


async def test_a_forced_route_is_followed_and_an_unknown_worker_is_refused() -> None:
    from controller.request import Route

    async with cluster() as twin:
        await twin.square()
        request = replace(asked(5), route=Route("p1", "d1", "tcp"))
        await twin.collect(request)
        timeline = twin.desk.request(request.request_id)
        assert timeline is not None
        assert (timeline.summary.prefill_worker, timeline.summary.decode_worker) == ("p1", "d1")
        local = replace(asked(5), route=Route("", "d0"))
        await twin.collect(local)
        assert any(command.HasField("generate") for command in twin.workers["d0"].commands)
        with pytest.raises(InvalidRequest, match="nobody"):
            await twin.collect(replace(asked(5), route=Route("p0", "nobody")))


async def test_events_are_acknowledged() -> None:
    async with cluster() as twin:
        worker = await twin.add(twin.twin("b0", PREFILL, DECODE))
        await twin.collect(asked(20))
        await twin.until(
            lambda: worker.session is not None and not worker.session.unacknowledged, "everything acknowledged"
        )


async def test_roles_change_and_a_draining_worker_gets_nothing_new() -> None:
    async with cluster() as twin:
        await twin.square()
        status = await twin.desk.set_roles("p1", ("prefill", "decode"))
        assert status.roles == ("prefill", "decode")
        for name in ("d0", "d1"):
            assert (await twin.desk.drain(name)).state == "DRAINING"
        got = await twin.collect(asked(5))
        assert got.count == 5
        assert not any(twin.workers[name].commands[1:] for name in ("d0", "d1"))


async def test_a_lost_caller_resumes_where_it_was() -> None:
    async with cluster() as twin:
        await twin.square()
        request, got = replace(asked(60), linger_s=2.0), Got()
        stream = twin.service.generate(request)
        async for item in stream:
            got.add(item)
            if got.count >= 7:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        resumed = await twin.collect(replace(request, next_index=(got.count,)))
        assert got.token_ids[0] + resumed.token_ids[0] == tokens_of(PROMPT, 3, 0, 60)
        assert got.text[0] + resumed.text[0] == bytes(tokens_of(PROMPT, 3, 0, 60)).decode()
        again = await twin.collect(replace(request, next_index=(58,)))
        assert again.token_ids[0] == tokens_of(PROMPT, 3, 0, 60)[58:]


async def test_a_request_that_nobody_knows_any_more_is_computed_again_from_the_index_on() -> None:
    async with cluster() as twin:
        await twin.square()
        got = await twin.collect(replace(asked(30), next_index=(12,)))
        assert got.token_ids[0] == tokens_of(PROMPT, 3, 0, 30)[12:]


async def test_an_abandoned_request_is_cancelled_when_its_linger_ends() -> None:
    async with cluster() as twin:
        await twin.square()
        stream = twin.service.generate(replace(asked(3000), linger_s=0.2))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert twin.service.live_requests == 1
        await twin.until(twin.idle, "idle")


async def test_a_malformed_batch_ends_that_session_only() -> None:
    async with cluster() as twin:
        await twin.square()
        running = asyncio.create_task(twin.collect(asked(200)))
        await twin.until(lambda: twin.service.live_requests == 1, "running")
        before = [name for name in twin.workers if twin.state(name) == "READY"]
        worker = next(worker for worker in twin.workers.values() if not worker.runs and not worker.reserved)
        worker.tell(worker_pb2.SessionResponse(tokens=worker_pb2.TokenBatch(request_keys=[1], token_ids=[2, 3])))
        await twin.until(lambda: twin.state(worker.worker_id) == "GONE", "gone")
        assert (await running).count == 200
        assert len(before) == 4
