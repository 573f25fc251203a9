"""Owns paged attention on CUDA with torch's varlen attention: the arguments of a step, and which form of the call is used.

Two forms. "paged": the kernel reads the pool's blocks through a block table; torch's own kernels take only pages of 256 tokens
there, FlashAttention 3 takes any. "packed": the keys of the step are gathered from the pool first. Which arguments the installed
torch knows is read from its signature once; then a form has to give the right answers on the device, or the next one is tried.
Never run on a GPU so far: tests cover everything but `TorchVarlen.__call__` on CUDA and `activate_flash_attention_3`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
import torch

from engine.attention import Partial
from engine.decoder import Decoder
from engine.paged_attention import PagedAttention, PagedPool
from engine.step_batch import StepBatch
from engine.torch_attention import TorchAttention
from service_kit.logs import get_logger

_log = get_logger(__name__)

Form = Literal["paged", "packed"]
_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
_TOLERANCE = 0.05  # of outputs and log-sum-exps of random normal queries, keys and values in bfloat16


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """What a step's calls have in common, in every layer. b sequences; tensors are int32 on the compute device.

    Packed: cu_seq_k. Paged: seqused_k and block_table; rows of the table are padded with the sequence's own first block.
    """

    cu_seq_q: torch.Tensor  # [b + 1]
    max_q: int
    max_k: int
    cu_seq_k: torch.Tensor | None  # [b + 1]
    seqused_k: torch.Tensor | None  # [b]
    block_table: torch.Tensor | None  # [b, pages]


class VarlenKernel(Protocol):
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall, window: int
    ) -> Partial:
        """query [n, heads, dim]; key, value [keys, kv_heads, dim] or [blocks, page tokens, kv_heads, dim].

        Causal: the last query of a sequence sees its last key. `window`: 0, or how many keys a query sees.
        """


@dataclass(frozen=True, slots=True)
class StepSequences:
    """Per sequence of a step, in the order of their rows: queries, keys (those of the step included), blocks of the keys."""

    counts: np.ndarray
    lengths: np.ndarray
    blocks: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, batch: StepBatch) -> StepSequences:
        counts = np.array([part.count for part in batch.parts])
        lengths = np.array([part.sequence.computed + part.count for part in batch.parts])
        return cls(counts, lengths, tuple(map(batch.blocks.of, range(len(batch.parts)))))


class VarlenAttention:
    """Implements engine.paged_attention.PagedAttention. `windows`: per layer, 0 or how many positions a row sees."""

    def __init__(self, pool: torch.Tensor, windows: Sequence[int], kernel: VarlenKernel, form: Form) -> None:
        self._pool = PagedPool(pool)
        self._windows = tuple(windows)
        self._kernel = kernel
        self._form = form

    def step(self, batch: StepBatch) -> VarlenStepAttention:
        return self.prepared(StepSequences.of(batch), batch.slots)

    def prepared(self, sequences: StepSequences, slots: torch.Tensor) -> VarlenStepAttention:
        call, rows = varlen_call(sequences, self._pool, self._form)
        return VarlenStepAttention(self._pool, self._windows, self._kernel, call, rows, self._pool.rows(slots))


class VarlenStepAttention:
    """rows: of the step's keys and values in the pool, where they are packed."""

    def __init__(
        self,
        pool: PagedPool,
        windows: Sequence[int],
        kernel: VarlenKernel,
        call: VarlenCall,
        rows: tuple[torch.Tensor, torch.Tensor] | None,
        places: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._pool = pool
        self._windows = windows
        self._kernel = kernel
        self._call = call
        self._rows = rows
        self._places = places

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.write(layer, self._places, key, value)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.partial(layer, query).output

    def partial(self, layer: int, query: torch.Tensor) -> Partial:
        if self._rows is None:
            blocks = self._pool.layers[layer]
            keys, values = blocks[:, 0], blocks[:, 1]  # strided views: only the last dimension need be contiguous
        else:
            keys, values = self._pool.take(layer, self._rows)
        return self._kernel(query, keys, values, self._call, self._windows[layer])


def varlen_call(
    sequences: StepSequences, pool: PagedPool, form: Form
) -> tuple[VarlenCall, tuple[torch.Tensor, torch.Tensor] | None]:
    """The arguments, and for the packed form the rows of the keys and of the values in the pool."""
    count, lengths = len(sequences.counts), sequences.lengths
    pages = -(-lengths // pool.page_tokens)
    table = np.empty((count, int(pages.max())), dtype=np.int32)
    for line, blocks, used in zip(table, sequences.blocks, pages, strict=True):
        line[:used], line[used:] = blocks[:used], blocks[0]
    starts = np.concatenate([[0], np.cumsum(sequences.counts), [0], np.cumsum(lengths), lengths, table.ravel()])
    # One copy to the device for all of them.
    numbers = torch.from_numpy(starts.astype(np.int32)).to(pool.device)
    cu_seq_q, cu_seq_k, used_k, flat = torch.split(numbers, [count + 1, count + 1, count, table.size])
    block_table = flat.view(table.shape)
    longest = int(sequences.counts.max()), int(lengths.max())
    if form == "paged":
        return VarlenCall(cu_seq_q, *longest, None, used_k, block_table), None
    rows = pool.rows(_slots(cu_seq_k, block_table, int(lengths.sum()), pool.page_tokens))
    return VarlenCall(cu_seq_q, *longest, cu_seq_k, None, None), rows


def _slots(cu_seq_k: torch.Tensor, block_table: torch.Tensor, keys: int, page_tokens: int) -> torch.Tensor:
    """int64 [keys], the slot of every key of every sequence; made on the device, which is never waited for."""
    owners = torch.arange(len(block_table), device=cu_seq_k.device)
    owners = torch.repeat_interleave(owners, cu_seq_k.diff(), output_size=keys)
    positions = torch.arange(keys, device=cu_seq_k.device) - cu_seq_k.long().index_select(0, owners)
    blocks = block_table.long()[owners, positions.div(page_tokens, rounding_mode="floor")]
    return blocks * page_tokens + positions.remainder(page_tokens)


# ---- torch's function


class TorchVarlen:
    """A VarlenKernel: torch.nn.attention.varlen.varlen_attn with the arguments that the installed torch accepts."""

    def __init__(self, function: Callable[..., object], accepted: frozenset[str], aux: object) -> None:
        self._function = function
        self.accepted = accepted
        self._aux = aux  # asks for the log-sum-exp

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall, window: int
    ) -> Partial:
        options: dict[str, object] = {
            "return_aux": self._aux,
            # torch counts the keys to the left of the query's own. (-1, 0) is its word for plain causal attention.
            "window_size": (window - 1, 0) if window else (-1, 0),
            "enable_gqa": query.shape[1] != key.shape[-2],
            "num_splits": 1,  # else the order of sums depends on the longest sequence of the batch
        }
        options = {name: option for name, option in options.items() if name in self.accepted}
        if call.block_table is not None:
            options |= {"seqused_k": call.seqused_k, "block_table": call.block_table}
        lengths = (call.cu_seq_q, call.cu_seq_k, call.max_q, call.max_k)
        made = self._function(query, key, value, *lengths, **options)
        output, lse = cast(tuple[torch.Tensor, torch.Tensor], made)
        return Partial(output, lse.transpose(0, 1))  # [heads, n], whatever its documentation says


def forms_of(accepted: frozenset[str]) -> list[Form]:
    """By the keyword arguments of varlen_attn: torch 2.10 has too few, 2.11 presumably those of the packed form, 2.12 all."""
    forms: list[Form] = []
    if {"return_aux", "window_size"} <= accepted:
        if {"seqused_k", "block_table", "enable_gqa"} <= accepted:
            forms.append("paged")
        forms.append("packed")
    return forms


def installed_varlen() -> TorchVarlen | None:
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    return TorchVarlen(varlen_attn, accepted_by(varlen_attn), AuxRequest(lse=True))


def accepted_by(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def activate_flash_attention_3() -> bool:
    """Puts FlashAttention 3 behind torch's operators where its package is installed and the device is a Hopper."""
    if torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError):
        return False
    return True


# ---- the choice


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a form is tried with."""

    heads: int
    windows: tuple[int, ...]
    dtype: torch.dtype  # of queries

    @classmethod
    def of(cls, decoder: Decoder) -> Geometry:
        dtype = decoder.embed(torch.zeros(1, dtype=torch.int64, device=decoder.device)).dtype
        return cls(decoder.spec.heads, decoder.spec.windows, dtype)


def device_attention(pool: torch.Tensor, geometry: Geometry) -> PagedAttention:
    """Varlen attention where it works for this pool on this device, else torch's operators; logs which, and why."""
    kernel = installed_varlen()
    if pool.is_cuda and kernel is not None:
        activate_flash_attention_3()
    accepted = frozenset[str]() if kernel is None else kernel.accepted
    return chosen(pool, geometry, kernel, forms_of(accepted))


def chosen(
    pool: torch.Tensor, geometry: Geometry, kernel: VarlenKernel | None, forms: Sequence[Form]
) -> PagedAttention:
    reasons = list(_misfits(pool, geometry))
    if kernel is None or not forms:
        reasons.append("this torch has no varlen attention with windows and log-sum-exp")
    if kernel is not None and not reasons:
        for form in forms:
            reason = trial(pool, geometry, kernel, form)
            if reason is None:
                _log.info("cuda_attention", form=form, instead_of=reasons)
                return VarlenAttention(pool, geometry.windows, kernel, form)
            reasons.append(f"{form}: {reason}")
    _log.info("cuda_attention", form="torch", instead_of=reasons)
    return TorchAttention(pool, geometry.windows)


def _misfits(pool: torch.Tensor, geometry: Geometry) -> Iterator[str]:
    dim = pool.shape[-1]
    if geometry.dtype not in _DTYPES:
        yield f"varlen attention does not compute in {geometry.dtype}"
    if pool.dtype != geometry.dtype:
        yield f"the pool is {pool.dtype}, queries are {geometry.dtype}"
    if dim % 8 or dim > _LARGEST_HEAD_DIM:
        yield f"head dimension {dim}"


def trial(pool: torch.Tensor, geometry: Geometry, kernel: VarlenKernel, form: Form) -> str | None:
    """What is wrong with a form of the call, tried on a few sequences; None: nothing. `pool` gives shape and device."""
    for window in sorted({0, *geometry.windows}):
        try:
            worst = _deviation(pool, geometry, kernel, form, window)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if not worst <= _TOLERANCE:
            return f"with window {window} its result is {worst:.3g} away from that in float64"
    return None


def _deviation(pool: torch.Tensor, geometry: Geometry, kernel: VarlenKernel, form: Form, window: int) -> float:
    page, kv_heads, dim = pool.shape[3:]
    counts, lengths = np.array([1, 1, 3, page + 5]), np.array([1, 2 * page + 3, 3, 3 * page])
    blocks = tuple(np.split(np.random.default_rng(1).permutation(16).astype(np.int32), 4))
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 16, 2, page, kv_heads, dim, generator=generator).to(pool.dtype)
    query = torch.randn(int(counts.sum()), geometry.heads, dim, generator=generator).to(geometry.dtype)
    attention = VarlenAttention(keys.to(pool.device), (min(window, page + 1),), kernel, form)
    step = attention.prepared(StepSequences(counts, lengths, blocks), torch.zeros(0, dtype=torch.int64))
    got = step.partial(0, query.to(pool.device))
    wanted = reference(query, keys[0], StepSequences(counts, lengths, blocks), min(window, page + 1))
    differences = [
        (one.cpu().double() - other).abs().max().item() if one.shape == other.shape else float("inf")
        for one, other in ((got.output, wanted.output), (got.lse, wanted.lse))
    ]
    return float("inf") if any(np.isnan(differences)) else max(differences)


def reference(query: torch.Tensor, layer: torch.Tensor, sequences: StepSequences, window: int) -> Partial:
    """The same in float64, one sequence after the other. layer: [blocks, k or v, page tokens, kv_heads, dim]."""
    group = query.shape[1] // layer.shape[-2]
    outputs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    rows = torch.split(query.double(), sequences.counts.tolist())
    for own, length, blocks in zip(rows, sequences.lengths.tolist(), sequences.blocks, strict=True):
        both = layer[torch.from_numpy(blocks).long()].double().transpose(0, 1).flatten(1, 2)[:, :length]
        key, value = both.repeat_interleave(group, 2)
        ends = torch.arange(length - len(own), length)[:, None]
        places = torch.arange(length)[None]
        hidden = (places > ends) | (places <= ends - window) if window else places > ends
        scores = torch.einsum("nhd,thd->hnt", own, key) * own.shape[-1] ** -0.5
        scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append(torch.einsum("hnt,thd->nhd", scores.softmax(-1), value))
        sums.append(scores.logsumexp(-1).transpose(0, 1))
    return Partial(torch.cat(outputs), torch.cat(sums))
