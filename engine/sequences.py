"""Owns what the engine knows of one dispatch and of each of its token sequences.

A dispatch:  active -> (gone)                  Submit "generate"
             active -> source -> (gone)        Submit "prefill": blocks stay until ReleaseSource
             reserved -> active -> (gone)      ReserveBlocks, Activate
             reserved -> ending -> (gone)      Cancel first: blocks stay until WriterDone
             active -> source -> (gone)        Cancel of a prefill whose KV was announced
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

from engine.block_tables import Table
from engine.prefix_index import KeyChain
from engine.protocol import Dispatch, LogprobRow, Work

Mode = Literal["prefill", "generate", "reserve"]
Phase = Literal["active", "source", "reserved", "ending"]


@dataclass(slots=True, eq=False)
class DispatchState:
    """choices: neither ended nor cancelled. table: of work.token_ids, while a peer may write it (reserved, ending) or read it
    (source); running sequences hold their own. loads: of its chunks' pages, as in Submit."""

    work: Work
    mode: Mode
    phase: Phase
    arrival: int  # order among all dispatches of this engine
    submitted_s: float
    choices: set[int]
    sequences: list[Sequence] = field(default_factory=list)
    table: Table | None = None
    started_s: float = -1.0  # before 0: not admitted yet
    loads: tuple[int, ...] = ()
    peer_done: bool = False  # no peer touches its blocks any more

    @property
    def dispatch(self) -> Dispatch:
        return self.work.dispatch

    @property
    def started(self) -> bool:
        return self.started_s >= 0


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one choice; before the fork, of all choices that share a prompt.

    tokens: int32, prompt and output. The KV of the first `computed` lies in `table`. A sequence whose missing tokens were
    computed draws its next token; so decoding, prefill and recompute after preemption are one thing.
    """

    state: DispatchState
    choices: tuple[int, ...]
    tokens: array[int]
    chain: KeyChain
    table: Table | None = None  # None: waiting
    computed: int = 0
    announced: int = 0  # blocks offered through KvReady
    prompt_rows: list[LogprobRow] = field(default_factory=list)
    blends: bool = False  # its KV is being made of chunks, up to the last token; steps leave it alone meanwhile

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def output_index(self) -> int:
        """Of the token that is drawn next."""
        return len(self.tokens) - self.state.work.prompt_tokens

    @property
    def forked(self) -> bool:
        """Whether it has drawn a token here, and so stands for one choice alone."""
        return len(self.tokens) * 4 > len(self.state.work.token_ids)

    @property
    def decodes(self) -> bool:
        """Whether it has drawn tokens here and needs one more position only."""
        return self.missing == 1 and self.computed > 0 and self.forked

    @property
    def age(self) -> tuple[int, int, int]:
        """Order of service: lower priority values first, then arrival."""
        return (self.state.work.priority, self.state.arrival, self.choices[0])

    @property
    def preemptable(self) -> bool:
        """A peer may be reading announced blocks; those stay where they are."""
        return self.state.mode != "prefill" and not self.blends
