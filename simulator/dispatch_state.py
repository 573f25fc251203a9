"""Owns the state of one dispatch inside a modelled engine.

waiting -> prefilling -> decoding -> (gone)            Submit "generate"
waiting -> prefilling -> source -> (gone)              Submit "prefill": source blocks stay until ReleaseSource
reserved -> decoding -> (gone)                         ReserveBlocks, Activate
reserved -> ending -> (gone)                           Cancel first: blocks stay until WriterDone
prefilling -> source -> (gone)                         Cancel of a prefill whose KV was announced
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.protocol import Dispatch, Work
from kv_transfer.keys import TOKEN_BYTES
from simulator.block_tables import Table

Phase = Literal["waiting", "prefilling", "source", "reserved", "ending", "decoding"]


@dataclass(slots=True)
class Sequence:
    """One choice that decodes. `token_id` was drawn last; its KV is computed by the next step."""

    dispatch: Dispatch
    choice: int
    table: Table
    key: bytes  # of its token stream, see simulator.token_draw
    token_id: int
    next_index: int  # output index of the next token


@dataclass(slots=True)
class DispatchState:
    work: Work
    mode: Literal["prefill", "generate", "reserve"]
    phase: Phase
    choices: set[int]  # neither ended nor cancelled
    submitted_s: float
    table: Table | None = None  # of work.token_ids; None before admission and after the fork
    sequences: dict[int, Sequence] = field(default_factory=dict)
    announced_blocks: int = 0
    started_s: float = 0.0
    peer_done: bool = False  # no writer (destination) or reader (source) of its blocks is left

    @property
    def token_count(self) -> int:
        return len(self.work.token_ids) // TOKEN_BYTES

    @property
    def first_index(self) -> int:
        """Output index of the first token drawn."""
        return self.token_count - self.work.prompt_tokens

    @property
    def missing_tokens(self) -> int:
        """Prompt tokens whose KV is not computed yet."""
        return self.token_count - (self.table.token_count if self.table else 0)

    def tables(self) -> list[Table]:
        own = [self.table] if self.table else []
        return own + [sequence.table for sequence in self.sequences.values()]
