"""Owns the batches of the benchmarks of shared prefixes: sequences that share blocks as the prompts of a tree do, and their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention_cost import AttentionCosts
from engine.attention_fit import KvShape, fitted_costs
from engine.attention_plan import Cut, Reader, plan
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.library import AttentionTasks, Kernels
from engine.step_work import Threads

PAGE, HEADS, KV_HEADS, DIM = 16, 12, 4, 64
SUFFIX = 128  # tokens of a sequence's own


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """`groups` groups of `leaves` sequences. All share `root_tokens`, those of a group `branch_tokens` more (multiples of a page)."""

    root_tokens: int
    leaves: int
    branch_tokens: int = 0
    groups: int = 1
    rows: int = (
        1  # tokens of each sequence that the step computes: 1 in a decode, a chunk's in a prefill; at most its own ones
    )

    @property
    def sequences(self) -> int:
        return self.groups * self.leaves

    @property
    def pages(self) -> int:
        """Of the whole tree, shared ones counted once."""
        return (self.root_tokens + self.groups * self.branch_tokens) // PAGE + self.sequences * self._own_pages

    @property
    def _own_pages(self) -> int:
        return max(SUFFIX, self.rows) // PAGE

    def readers(self) -> list[Reader]:
        blocks = np.arange(self.pages, dtype=np.int32)
        branch, own = self.branch_tokens // PAGE, self._own_pages
        root, rest = np.split(blocks, [self.root_tokens // PAGE])
        branches, tails = np.split(rest, [self.groups * branch])
        first = self.root_tokens + self.branch_tokens + own * PAGE - self.rows
        readers = []
        for ordinal in range(self.sequences):
            group = ordinal // self.leaves
            parts = (root, branches[group * branch : (group + 1) * branch], tails[ordinal * own : (ordinal + 1) * own])
            readers.append(Reader(ordinal * self.rows, self.rows, first, np.concatenate(parts)))
        return readers


def fitted(kernels: Kernels, dtype: torch.dtype) -> AttentionCosts:
    """As the engine fits them at its start."""
    return fitted_costs(kernels, KvShape(KV_HEADS, DIM, PAGE, dtype))


def tasks_of(kernels: Kernels, readers: Sequence[Reader], costs: AttentionCosts, *, share: bool) -> AttentionTasks:
    """As the engine cuts them."""
    ends = torch.cat([torch.arange(each.first, each.first + each.count, dtype=torch.int32) + 1 for each in readers])
    threads = Threads(torch.get_num_threads(), KV_HEADS)
    tasks = plan(readers, Cut(kernels.chunk, PAGE, 0, threads.units, share, HEADS // KV_HEADS, costs, threads))
    return task_arrays(tasks, ReaderBlocks.of(readers), torch.zeros_like(ends), ends)
