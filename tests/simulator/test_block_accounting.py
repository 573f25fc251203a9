"""Blocks of a modelled engine: none leaks and none is owned twice, whatever commands come in whatever order."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Dispatch,
    Freed,
    PrefillDone,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    Started,
    Submit,
    WorkFailed,
    WriterDone,
)
from simulator.modelled_engine import ModelledConfig
from simulator.token_draw import Vocabulary
from tests.simulator.works import SAMPLING, Bench, layout, work

KEYS = st.integers(1, 6)
BLOCKS = 12


class EngineMachine(RuleBasedStateMachine):
    """Random commands and steps; at the end every dispatch is ended and the pool must be whole."""

    @initialize()
    def start(self) -> None:
        config = replace(ModelledConfig(), layout=layout(BLOCKS), kv_bytes=False, vocabulary=Vocabulary(eos_rate=0.05))
        self.bench = Bench(config)
        self.sent: set[Dispatch] = set()

    @rule(
        key=KEYS,
        attempt=st.integers(1, 3),
        length=st.integers(1, 100),
        choices=st.integers(1, 3),
        mode=st.sampled_from(["prefill", "generate", "reserve"]),
        shared=st.booleans(),
    )
    def submit(self, key: int, attempt: int, length: int, choices: int, mode: str, shared: bool) -> None:
        prompt = [0 if shared else key] * length
        sampling = msgspec.structs.replace(SAMPLING, max_tokens=40)
        job = work(prompt, key=key, attempt=attempt, choices=tuple(range(choices)), sampling=sampling)
        self.sent.add(job.dispatch)
        if mode == "reserve":
            self.bench.engine.handle(ReserveBlocks(job, 10_000))
        else:
            self.bench.engine.handle(Submit(job, "prefill" if mode == "prefill" else "generate"))

    @rule(key=KEYS, attempt=st.integers(1, 3), choice=st.none() | st.integers(0, 2))
    def cancel(self, key: int, attempt: int, choice: int | None) -> None:
        self.bench.engine.handle(Cancel(Dispatch(key, attempt), () if choice is None else (choice,)))

    @rule(key=KEYS, attempt=st.integers(1, 3), going_on=st.integers(0, 3))
    def activate(self, key: int, attempt: int, going_on: int) -> None:
        self.bench.engine.handle(Activate(Dispatch(key, attempt), tuple((choice, 50) for choice in range(going_on))))

    @rule(key=KEYS, attempt=st.integers(1, 3))
    def writer_done(self, key: int, attempt: int) -> None:
        self.bench.engine.handle(WriterDone(Dispatch(key, attempt)))

    @rule(key=KEYS, attempt=st.integers(1, 3))
    def release_source(self, key: int, attempt: int) -> None:
        self.bench.engine.handle(ReleaseSource(Dispatch(key, attempt)))

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.engine.step()

    @rule()
    def clear(self) -> None:
        self.bench.engine.handle(ClearPrefixCache())

    @invariant()
    def no_block_is_leaked_and_every_token_comes_once(self) -> None:
        if not hasattr(self, "bench"):
            return
        load = self.bench.engine.load()
        assert load.blocks_leaked == 0
        assert 0 <= load.blocks_free <= BLOCKS

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        engine, sink = self.bench.engine, self.bench.sink
        for dispatch in self.sent:
            engine.handle(Cancel(dispatch))
            engine.handle(WriterDone(dispatch))
            engine.handle(ReleaseSource(dispatch))
        assert not engine.step()
        load = engine.load()
        assert (load.blocks_free, load.blocks_leaked) == (BLOCKS, 0)
        assert (load.running, load.waiting, load.reserved_blocks) == (0, 0, 0)
        taken = [event.dispatch for event in sink.events if isinstance(event, Reserved | Started)]
        freed = [event.dispatch for event in sink.of(Freed)]
        assert set(taken) <= set(freed)
        answered = {e.dispatch for e in sink.events if isinstance(e, Freed | WorkFailed | ReserveRefused | PrefillDone)}
        assert self.sent <= answered
        engine.close()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
