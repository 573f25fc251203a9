"""Owns the dispatches that a modelled engine holds, and when their blocks go back to the pool.

They go back only when nobody can touch them any more: request and writer at a destination, request and source lease at a source
(`simulator.dispatch_state` draws the phases).
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.protocol import Dispatch, EventSink, Freed
from simulator.block_tables import BlockTables
from simulator.dispatch_state import DispatchState, Phase, Sequence


class DispatchBook:
    def __init__(self, tables: BlockTables, sink: EventSink) -> None:
        self.states: dict[Dispatch, DispatchState] = {}
        self.tables = tables
        self._sink = sink

    def in_phase(self, phase: Phase) -> list[DispatchState]:
        return [state for state in self.states.values() if state.phase == phase]

    def sequences(self) -> Iterator[Sequence]:
        """Everything that decodes, oldest dispatch first."""
        for state in self.states.values():
            yield from state.sequences.values()

    # ---- choices

    def fork(self, state: DispatchState, choice: int, key: bytes, token_id: int) -> None:
        """`choice` goes on by itself, in a table that begins as the dispatch's own."""
        assert state.table is not None
        table = self.tables.fork(state.table)
        state.sequences[choice] = Sequence(state.work.dispatch, choice, table, key, token_id, state.first_index + 1)

    def end_choice(self, state: DispatchState, choice: int) -> None:
        state.choices.discard(choice)
        sequence = state.sequences.pop(choice, None)
        if sequence is not None:
            self.tables.close(sequence.table)

    # ---- ends

    def close_own_table(self, state: DispatchState) -> None:
        assert state.table is not None
        self.tables.close(state.table)
        state.table = None

    def settle(self, dispatch: Dispatch) -> None:
        """Forgets `dispatch` if nothing of it is left."""
        state = self.states.get(dispatch)
        if state is not None and state.phase == "decoding" and not state.sequences and state.table is None:
            self.forget(state)

    def peer_done(self, dispatch: Dispatch) -> None:
        """No peer writes to, or reads from, the blocks of `dispatch` any more."""
        state = self.states.get(dispatch)
        if state is not None:
            state.peer_done = True
            self.settle_blocks(state)

    def settle_blocks(self, state: DispatchState) -> None:
        """Frees the blocks of an ended dispatch once its peer is done with them too."""
        if state.peer_done and state.phase in ("source", "ending"):
            self.forget(state)

    def forget(self, state: DispatchState) -> None:
        if state.table is not None:
            self.close_own_table(state)
        del self.states[state.work.dispatch]
        self._sink.emit(Freed(state.work.dispatch))
