"""Owns what a modelled engine's dispatches go through: each command, and each step, moves them from phase to phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from engine.page_protocol import LoadPages, OfferPages, PagesLate, PagesLoaded, PagesOpened, PagesSaved
from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Command,
    EventSink,
    PrefillDone,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    SetPolicy,
    Started,
    Stop,
    Submit,
    WorkFailed,
    WriterDone,
)
from engine.refusals import Doorkeeper
from pdserve.errors import NoCapacity, PdserveError
from simulator.dispatch_book import DispatchBook
from simulator.dispatch_state import DispatchState
from simulator.step_tokens import StepDraws, prompt_logprobs
from simulator.token_draw import Vocabulary, stream_key


class CommandDesk:
    def __init__(
        self,
        book: DispatchBook,
        vocabulary: Vocabulary,
        max_context_tokens: int,
        policy: SetPolicy,
        sink: EventSink,
        clock: Callable[[], float],
    ) -> None:
        self.policy = policy
        self._book = book
        self._vocabulary = vocabulary
        self._sink = sink
        self._clock = clock
        self._doorkeeper = Doorkeeper(
            max_context_tokens, book.tables.page_tokens, book.tables.pool.size, vocabulary.size
        )

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case ReserveBlocks():
                self._reserve(command)
            case Activate():
                self._activate(command)
            case Cancel():
                self._cancel(command)
            case WriterDone() | ReleaseSource():
                self._book.peer_done(command.dispatch)
            case SetPolicy():
                self.policy = command
            case ClearPrefixCache():
                self._book.tables.clear_cached()
            case LoadPages():
                self._sink.emit(PagesOpened(command.load_id, 0, ()))  # modelled KV has no bytes to load
            case OfferPages() | PagesSaved() | PagesLoaded() | PagesLate():
                pass
            case Stop():
                pass
            case _:
                assert_never(command)

    # ---- what a step does to a dispatch

    def start(self, state: DispatchState, cached_tokens: int) -> None:
        """`state` was admitted with a table for its whole prompt."""
        assert state.table is not None
        state.phase = "prefilling"
        state.started_s = self._clock()
        queue_us = int((state.started_s - state.submitted_s) * 1e6)
        self._sink.emit(Started(state.work.dispatch, tuple(state.table.blocks), cached_tokens, queue_us))

    def prefilled(self, state: DispatchState, draws: StepDraws) -> None:
        """The prompt's KV is complete: draws the first token of every choice and forks those that go on."""
        assert state.table is not None
        work = state.work
        if work.sampling.prompt_logprobs is not None:
            self._sink.emit(prompt_logprobs(work, self._vocabulary))
        for choice in sorted(state.choices):
            key = stream_key(work, choice)
            token_id, goes_on = draws.draw(work, choice, key, state.first_index)
            if goes_on:
                self._book.fork(state, choice, key, token_id)
            else:
                state.choices.discard(choice)
        state.phase = "decoding"

    def after_first_tokens(self, state: DispatchState) -> None:
        """What follows the first tokens: the end of a prefill, or decoding in private tables."""
        assert state.table is not None
        if state.mode == "prefill":
            going_on = tuple((choice, sequence.token_id) for choice, sequence in state.sequences.items())
            compute_us = int((self._clock() - state.started_s) * 1e6)
            for choice in list(state.sequences):
                self._book.end_choice(state, choice)
            state.phase = "source"
            self._sink.emit(PrefillDone(state.work.dispatch, going_on, compute_us))
            self._book.settle_blocks(state)
            return
        self._book.close_own_table(state)
        self._book.settle(state.work.dispatch)

    def fail_choice(self, state: DispatchState, choice: int, error: PdserveError) -> None:
        self._book.end_choice(state, choice)
        self._sink.emit(WorkFailed(state.work.dispatch, (choice,), error.reason, str(error)))

    # ---- commands

    def _submit(self, command: Submit) -> None:
        work = command.work
        if work.dispatch in self._book.states:
            return  # a duplicate message has no effect
        error = self._doorkeeper.refusal(work, self._clock())
        if error is not None:
            self._sink.emit(WorkFailed(work.dispatch, (), error.reason, str(error)))
            return
        self._book.states[work.dispatch] = DispatchState(
            work, command.mode, "waiting", set(work.choices), self._clock()
        )

    def _reserve(self, command: ReserveBlocks) -> None:
        work = command.work
        if work.dispatch in self._book.states:
            return
        state = DispatchState(work, "reserve", "reserved", set(work.choices), self._clock())
        error = self._doorkeeper.refusal(work, self._clock()) or self._open_reserved(state)
        if error is not None:
            self._sink.emit(ReserveRefused(work.dispatch, error.reason, str(error)))
            return
        assert state.table is not None
        blocks = tuple(state.table.blocks)
        generations = tuple(self._book.tables.pool.generation(block) for block in blocks)
        self._book.states[work.dispatch] = state
        self._sink.emit(Reserved(work.dispatch, blocks, generations, state.table.token_count))

    def _activate(self, command: Activate) -> None:
        state = self._book.states.get(command.dispatch)
        if state is None or state.phase not in ("reserved", "ending"):
            return  # cancelled and freed before, or a duplicate
        state.peer_done = True
        if state.phase == "ending":
            self._book.settle_blocks(state)
            return
        assert state.table is not None
        state.phase = "decoding"
        start = state.table.token_count * 4
        if self._book.tables.adopt(state.table, state.work.token_ids[start:]):
            for choice, token_id in command.first_tokens:
                if choice in state.choices:
                    self._book.fork(state, choice, stream_key(state.work, choice), token_id)
        else:
            message = "The KV that was handed over is not that of the prompt."
            self._sink.emit(WorkFailed(command.dispatch, (), "kv_corrupt", message))
        state.choices.intersection_update(state.sequences)
        self._book.close_own_table(state)
        self._book.settle(command.dispatch)

    def _cancel(self, command: Cancel) -> None:
        state = self._book.states.get(command.dispatch)
        if state is None:
            self._doorkeeper.bury(command.dispatch, self._clock())
            return
        for choice in command.choices or tuple(state.choices):
            self._book.end_choice(state, choice)
        if state.choices:
            return
        self._doorkeeper.bury(command.dispatch, self._clock())
        match state.phase:
            case "waiting":
                self._book.forget(state)
            case "prefilling":
                # A sender may be reading what was announced, until it says ReleaseSource.
                state.phase = "source"
                state.peer_done |= not state.announced_blocks
                self._book.settle_blocks(state)
            case "reserved":
                state.phase = "ending"
                self._book.settle_blocks(state)
            case "decoding":
                self._book.settle(command.dispatch)
            case "source" | "ending":
                pass
            case _:
                assert_never(state.phase)

    # ---- parts

    def _open_reserved(self, state: DispatchState) -> PdserveError | None:
        """All blocks, with the head-room of running sequences left over, or none."""
        pool, headroom = self._book.tables.pool, self.policy.decode_headroom_blocks
        state.table = self._book.tables.open(state.work, state.token_count, headroom)
        if state.table is not None:
            return None
        needed = self._book.tables.blocks_for(state.token_count)
        return NoCapacity(
            f"{needed} KV blocks are needed; {pool.available} are free, {headroom} of them kept for growth."
        )
