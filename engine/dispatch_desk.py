"""Owns the dispatches of the native engine: takes commands, moves each dispatch through its phases, frees its blocks. Torch-free.

A dispatch's blocks go back to the pool only when nobody can touch them any more: request and writer at a destination, request
and source lease at a source (`engine.sequences` draws the phases).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping

from engine.block_tables import BlockTables, Table
from engine.prefix_index import KeyChain
from engine.protocol import (
    Activate,
    Cancel,
    Dispatch,
    EventSink,
    Freed,
    PrefillDone,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    Submit,
    Work,
    WorkFailed,
)
from engine.refusals import Doorkeeper
from engine.schedule import Schedule
from engine.sequences import DispatchState, Mode, Phase, Sequence
from pdserve.errors import NoCapacity, PdserveError


class DispatchDesk:
    def __init__(
        self,
        tables: BlockTables,
        schedule: Schedule,
        doorkeeper: Doorkeeper,
        sink: EventSink,
        clock: Callable[[], float],
        fingerprint_seed: int,
    ) -> None:
        self.states: dict[Dispatch, DispatchState] = {}
        self._tables = tables
        self._schedule = schedule
        self._doorkeeper = doorkeeper
        self._sink = sink
        self._clock = clock
        self._fingerprint_seed = fingerprint_seed
        self._arrivals = 0

    @property
    def reserved_blocks(self) -> int:
        return sum(len(state.table.blocks) for state in self.states.values() if _reserved(state) and state.table)

    def held_tables(self) -> Iterator[Table]:
        """Every table of every live dispatch."""
        for state in self.states.values():
            if state.table is not None:
                yield state.table
            yield from (sequence.table for sequence in state.sequences if sequence.table is not None)

    # ---- commands

    def submit(self, command: Submit) -> None:
        work = command.work
        if work.dispatch in self.states:
            return  # a duplicate message has no effect
        error = self._doorkeeper.refusal(work, self._clock())
        if error is not None:
            self._sink.emit(WorkFailed(work.dispatch, (), error.reason, str(error)))
            return
        state = self._state(work, command.mode)
        state.loads = command.loads
        sequence = Sequence(state, work.choices, _tokens(work), self._chain(work), blends=work.blend is not None)
        state.sequences.append(sequence)
        self._schedule.submit(sequence)

    def reserve(self, command: ReserveBlocks) -> None:
        work = command.work
        if work.dispatch in self.states:
            return
        error = self._doorkeeper.refusal(work, self._clock())
        table = None if error else self._open_reserved(work)
        if table is None:
            error = error or self._no_capacity(work)
            self._sink.emit(ReserveRefused(work.dispatch, error.reason, str(error)))
            return
        self._state(work, "reserve").table = table
        generations = tuple(self._tables.pool.generation(block) for block in table.blocks)
        cached_tokens = table.stored * self._tables.page_tokens
        self._sink.emit(Reserved(work.dispatch, tuple(table.blocks), generations, cached_tokens))

    def activate(self, command: Activate, absorb: Callable[[list[int]], None]) -> None:
        """`absorb(blocks)` brings received blocks to where the engine computes."""
        state = self.states.get(command.dispatch)
        if state is None or state.phase not in ("reserved", "ending"):
            return  # cancelled and freed before, or a duplicate
        state.peer_done = True
        if state.phase == "reserved":
            self._begin_decoding(state, command, absorb)
        self._settle(state)

    def cancel(self, command: Cancel) -> None:
        state = self.states.get(command.dispatch)
        if state is None:
            self._doorkeeper.bury(command.dispatch, self._clock())
            return
        self.end_choices(state, command.choices or tuple(state.choices))
        if not state.choices:
            self._doorkeeper.bury(command.dispatch, self._clock())

    def peer_done(self, dispatch: Dispatch) -> None:
        """No peer writes to, or reads from, the blocks of `dispatch` any more."""
        state = self.states.get(dispatch)
        if state is not None:
            state.peer_done = True
            self._settle(state)

    # ---- what a step does to a dispatch

    def prompt_done(self, sequence: Sequence, first_tokens: dict[int, int]) -> None:
        """The KV of the work is complete. first_tokens: token id per choice that goes on."""
        state = sequence.state
        for choice in set(sequence.choices) - first_tokens.keys():
            state.choices.discard(choice)
        if state.mode == "prefill":
            self._become_source(state, sequence)
            compute_us = int((self._clock() - state.started_s) * 1e6)
            self._sink.emit(PrefillDone(state.dispatch, tuple(first_tokens.items()), compute_us))
        else:
            state.sequences.remove(sequence)
            self._decode_on(state, first_tokens, self._schedule.withdraw(sequence))
        self._settle(state)

    def end_choices(self, state: DispatchState, choices: tuple[int, ...]) -> None:
        """`choices` ended, failed or were cancelled: their blocks go as soon as nobody touches them."""
        state.choices.difference_update(choices)
        for sequence in list(state.sequences):
            sequence.choices = tuple(choice for choice in sequence.choices if choice in state.choices)
            if sequence.choices:
                continue
            if sequence.announced and not state.peer_done:
                # A sender may be reading what was announced, until it says ReleaseSource.
                self._become_source(state, sequence)
            else:
                state.sequences.remove(sequence)
                self._schedule.remove(sequence)
        if not state.choices and state.phase == "reserved":
            state.phase = "ending"
        self._settle(state)

    def fail(self, sequence: Sequence, error: PdserveError) -> None:
        choices = sequence.choices
        self._sink.emit(WorkFailed(sequence.state.dispatch, choices, error.reason, str(error)))
        self.end_choices(sequence.state, choices)

    # ---- parts

    def _state(self, work: Work, mode: Mode) -> DispatchState:
        self._arrivals += 1
        phase: Phase = "reserved" if mode == "reserve" else "active"
        state = DispatchState(work, mode, phase, self._arrivals, self._clock(), set(work.choices))
        self.states[work.dispatch] = state
        return state

    def _chain(self, work: Work) -> KeyChain:
        return KeyChain(self._tables.page_tokens, work.block_hashes, self._fingerprint_seed, work.tenant)

    def _open_reserved(self, work: Work) -> Table | None:
        """All blocks, with the head-room of running sequences and what preempted ones are owed left over, or none."""
        tokens = _tokens(work)
        spare = 0
        if self._schedule.running or any(map(_reserved, self.states.values())):
            spare = self._schedule.policy.decode_headroom_blocks + self._schedule.owed_blocks()
        reusable = len(tokens) if self._schedule.prefix_reuse else 0
        return self._tables.open(tokens, self._chain(work), reusable, spare)

    def _no_capacity(self, work: Work) -> NoCapacity:
        needed, pool = self._tables.pages_for(len(work.token_ids) // 4), self._tables.pool
        return NoCapacity(
            f"The request needs {needed} KV blocks; {pool.available} of {pool.size} are free, "
            f"and {self._schedule.policy.decode_headroom_blocks} are kept for running requests."
        )

    def _begin_decoding(self, state: DispatchState, command: Activate, absorb: Callable[[list[int]], None]) -> None:
        table = state.table
        assert table is not None
        absorb(table.blocks[table.stored :].tolist())
        table.received = len(_tokens(state.work)) // self._tables.page_tokens
        state.phase = "active"
        state.table = None
        state.started_s = self._clock()
        going_on = dict(command.first_tokens)
        state.choices.intersection_update(going_on)
        self._decode_on(state, {choice: going_on[choice] for choice in sorted(state.choices)}, table)

    def _decode_on(self, state: DispatchState, first_tokens: Mapping[int, int], table: Table) -> None:
        """A sequence per choice, over the KV of the work in `table`, copy-on-write. The last of them takes `table` itself."""
        tokens = _tokens(state.work)
        if len(first_tokens) == 1:
            self._tables.store_later(table, tokens, len(tokens))  # its second token is waited for
        else:
            self._tables.store(table, tokens, len(tokens))
        for ordinal, (choice, token_id) in enumerate(first_tokens.items(), 1):
            own = table if ordinal == len(first_tokens) else self._tables.fork(table)
            self._enter(state, choice, tokens + array("i", (token_id,)), own)
        if not first_tokens:
            self._tables.close(table)

    def _enter(self, state: DispatchState, choice: int, tokens: array[int], table: Table) -> None:
        """All of `tokens` but the last are in the KV of `table`."""
        sequence = Sequence(state, (choice,), tokens, table.chain, table, len(tokens) - 1)
        state.sequences.append(sequence)
        self._schedule.enter(sequence)

    def _become_source(self, state: DispatchState, sequence: Sequence) -> None:
        """The blocks stay until ReleaseSource; nothing is computed any more."""
        state.sequences.remove(sequence)
        state.table = self._schedule.withdraw(sequence)
        state.phase = "source"
        state.choices.clear()

    def _close_own_table(self, state: DispatchState) -> None:
        if state.table is not None:
            self._tables.close(state.table)
            state.table = None

    def _settle(self, state: DispatchState) -> None:
        """Forgets a dispatch of which nothing is left, once its peer is done with its blocks too."""
        if (
            state.phase == "reserved"
            or (state.phase in ("source", "ending") and not state.peer_done)
            or state.sequences
        ):
            return
        self._close_own_table(state)
        if self.states.pop(state.dispatch, None) is not None:
            self._sink.emit(Freed(state.dispatch))


def _tokens(work: Work) -> array[int]:
    return array("i", work.token_ids)


def _reserved(state: DispatchState) -> bool:
    return state.phase in ("reserved", "ending")
