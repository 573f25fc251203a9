"""Owns the loaded kernels: checked calls of the C++ library on torch tensors. See kernels.cpp for what they promise."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.kernels.build import INSTRUCTION_SETS, ROUNDING, library_path

_PLAIN, _ADD, _GATE = range(3)  # enum Finish of kernels.cpp
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # enum Element of kernels.cpp


class _Linear(ctypes.Structure):
    """struct Linear of kernels.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("k_count", ctypes.c_long),
        ("w", ctypes.c_void_p),
        ("half", ctypes.c_int),
        ("finish", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("bias", "onto", "y")),
        ("columns", ctypes.c_long),
    )


class _Attention(ctypes.Structure):
    """struct Attention of kernels.cpp."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_long),
        ("pool", ctypes.c_void_p),
        ("element", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("dim", ctypes.c_int),
        ("page_tokens", ctypes.c_int),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("begins", "ends")),
        ("tasks", ctypes.c_int),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "task_rows",
                "task_counts",
                "task_blocks",
                "task_chunks",
                "task_slots",
                "rows",
                "blocks",
                "slots",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("partial", "partial_lse", "output")),
    )


@dataclass(frozen=True, slots=True)
class AttentionTasks:
    """What one step attends to, the same in every layer. All int32 and contiguous; see struct Attention of kernels.cpp."""

    begins: torch.Tensor
    ends: torch.Tensor
    task_rows: torch.Tensor
    task_counts: torch.Tensor
    task_blocks: torch.Tensor
    task_chunks: torch.Tensor
    task_slots: torch.Tensor
    rows: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    merged_rows: torch.Tensor
    merged_starts: torch.Tensor
    slot_count: int


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """packed: [panels, k, panel] float32 or [panels, k / 2, panel, 2] bfloat16; bias: [panels, panel] float32; all zero-padded.
    columns: of the result."""

    packed: torch.Tensor
    bias: torch.Tensor | None
    columns: int


class Kernels:
    """`panel`: columns of a packed weight's panel; `lanes`: head dimensions must be multiples of it; `chunk`: keys of a partial."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self._library = library
        self.instruction_set = instruction_set
        self.panel = int(library.kernels_panel())
        self.lanes = int(library.kernels_lanes())
        self.chunk = int(library.kernels_chunk())
        library.kernels_attention_unevenness.restype = ctypes.c_double

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """weight: [columns, k] float32 or bfloat16; bias: [columns]."""
        packed = _along_panels(_panels(weight, self.panel))
        return PackedLinear(packed, None if bias is None else _panels(bias.float(), self.panel), len(weight))

    def pack_gated(self, gate_up: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """gate_up: [2 * columns, k], the gate's rows and then as many of what it gates. Half a panel is of either."""
        packed = _along_panels(self._halves(gate_up))
        return PackedLinear(packed, None if bias is None else self._halves(bias.float()), len(gate_up) // 2)

    def _halves(self, gate_up: torch.Tensor) -> torch.Tensor:
        return torch.cat([_panels(half, self.panel // 2) for half in gate_up.chunk(2)], 1)

    def linear(self, x: torch.Tensor, weights: PackedLinear) -> torch.Tensor:
        """x [rows, k] float32 -> x W^T + b [rows, columns] float32. With ROUNDING x is rounded where the weights are bfloat16."""
        return self._linear(x, weights, _PLAIN, None)

    def linear_onto(self, onto: torch.Tensor, x: torch.Tensor, weights: PackedLinear) -> torch.Tensor:
        """onto [rows, columns] + x W^T + b, float32. `onto` stays what it is."""
        assert onto.is_contiguous()
        assert onto.dtype == torch.float32
        assert onto.shape == (len(x), weights.columns)
        return self._linear(x, weights, _ADD, onto)

    def gated(self, x: torch.Tensor, weights: PackedLinear) -> torch.Tensor:
        """With weights of `pack_gated`: silu(x G^T) * (x U^T) [rows, columns], float32."""
        return self._linear(x, weights, _GATE, None)

    def _linear(self, x: torch.Tensor, weights: PackedLinear, finish: int, onto: torch.Tensor | None) -> torch.Tensor:
        half = weights.packed.dtype == torch.bfloat16
        x = F.pad(x, (0, 1)) if half and x.shape[1] % 2 else x.contiguous()
        rows, k_count = x.shape
        assert x.dtype == torch.float32
        assert weights.packed.shape[1] * (2 if half else 1) == k_count
        out = torch.empty(rows, weights.columns)
        call = _Linear(
            x.data_ptr(), rows, k_count, weights.packed.data_ptr(), half, finish,
            weights.bias.data_ptr() if weights.bias is not None else None,
            onto.data_ptr() if onto is not None else None, out.data_ptr(), weights.columns,
        )  # fmt: skip
        self._library.kernels_linear(ctypes.byref(call))
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [rows, count] with weight [count], or x [rows, heads, count] with weight [heads, count] -> contiguous, float32."""
        assert x.dtype == weight.dtype == torch.float32
        assert x.stride(-1) == 1
        assert x.dim() == 2 or x.stride(1) == x.shape[2]
        out = torch.empty(x.shape)
        self._library.kernels_norm(
            _pointer(x), _long(len(x)), _long(x.stride(0)), _long(x.shape[-1]), _pointer(weight.contiguous()),
            _long(1 if x.dim() == 2 else x.shape[1]), ctypes.c_float(eps), _pointer(out),
        )  # fmt: skip
        return out

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotates heads [rows, count, dim] float32 by halves, in place. cos_sin: [rows, dim], cosines and then sines."""
        rows, count, dim = heads.shape
        assert heads.stride()[1:] == (dim, 1)
        assert cos_sin.is_contiguous()
        assert cos_sin.shape == (rows, dim)
        self._library.kernels_rotate(
            _pointer(heads), _long(rows), _long(heads.stride(0)), _long(count), _long(dim), _pointer(cos_sin)
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
        """key, value [rows, kv_heads, dim] float32 -> their `slots` (int64 [rows]) in one layer of the pool, in its dtype."""
        rows, kv_heads, dim = key.shape
        assert key.stride()[1:] == value.stride()[1:] == (dim, 1)
        self._library.kernels_write(
            _pointer(key), _pointer(value), _long(rows), _long(key.stride(0)), _long(value.stride(0)),
            _long(kv_heads * dim), _pointer(slots), _long(pool.shape[2]), _ELEMENTS[pool.dtype], _pointer(pool),
        )  # fmt: skip

    def attention(self, query: torch.Tensor, pool: torch.Tensor, tasks: AttentionTasks) -> torch.Tensor:
        """query [rows, heads, dim] float32, pool of one layer [block, 2, page token, kv_head, dim] -> [rows, heads, dim]. With
        ROUNDING queries and the softmax's weights are rounded where the pool is bfloat16."""
        return AttentionCall(self, tasks)(query, pool)

    def call_attention(self, call: _Attention, tasks: AttentionTasks) -> None:
        self._library.kernels_attention(
            ctypes.byref(call), _pointer(tasks.merged_rows), _pointer(tasks.merged_starts), len(tasks.merged_rows)
        )

    def unevenness(self, query: torch.Tensor, pool: torch.Tensor, tasks: AttentionTasks) -> float:
        """Of the same call: the work of the busiest thread against an even share, as the kernels count it before they begin."""
        return float(self._library.kernels_attention_unevenness(ctypes.byref(_attention_call(query, pool, tasks))))


class AttentionCall:
    """Kernels.attention of the same tasks again and again: in every layer, over pools of one shape and queries of one shape. What
    the tasks hold may change in place, where it lies may not."""

    def __init__(self, kernels: Kernels, tasks: AttentionTasks) -> None:
        self._kernels = kernels
        self._tasks = tasks
        self._call: _Attention | None = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._partials: tuple[torch.Tensor, torch.Tensor] | None = None  # kept for their memory

    @property
    def tasks(self) -> AttentionTasks:
        return self._tasks

    def __call__(self, query: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        output = torch.empty(query.shape)
        call = self._call or self._open(query, pool)
        assert self._shapes == (query.shape, pool.shape)
        assert pool.is_contiguous()
        assert query.dtype == torch.float32
        assert query.stride(2) == 1
        assert query.stride(1) == query.shape[2]
        call.query, call.query_stride = query.data_ptr(), query.stride(0)
        call.pool, call.output = pool.data_ptr(), output.data_ptr()
        self._kernels.call_attention(call, self._tasks)
        return output

    def _open(self, query: torch.Tensor, pool: torch.Tensor) -> _Attention:
        _, heads, dim = query.shape
        assert not dim % self._kernels.lanes
        partial = torch.empty(self._tasks.slot_count, heads, dim)
        partial_lse = torch.empty(self._tasks.slot_count, heads)
        call = _attention_call(query, pool, self._tasks)
        call.partial, call.partial_lse = partial.data_ptr(), partial_lse.data_ptr()
        self._call, self._shapes, self._partials = call, (query.shape, pool.shape), (partial, partial_lse)
        return call


def _attention_call(query: torch.Tensor, pool: torch.Tensor, tasks: AttentionTasks) -> _Attention:
    _, heads, dim = query.shape
    _, _, page_tokens, kv_heads, pool_dim = pool.shape
    assert query.dtype == torch.float32
    assert query.stride()[1:] == (dim, 1)
    assert pool.is_contiguous()
    assert dim == pool_dim
    return _Attention(
        query.data_ptr(), query.stride(0), pool.data_ptr(), _ELEMENTS[pool.dtype], heads, kv_heads, dim, page_tokens,
        dim**-0.5, tasks.begins.data_ptr(), tasks.ends.data_ptr(), len(tasks.task_rows), tasks.task_rows.data_ptr(),
        tasks.task_counts.data_ptr(), tasks.task_blocks.data_ptr(), tasks.task_chunks.data_ptr(),
        tasks.task_slots.data_ptr(), tasks.rows.data_ptr(), tasks.blocks.data_ptr(), tasks.slots.data_ptr(),
    )  # fmt: skip


def _panels(weight: torch.Tensor, width: int) -> torch.Tensor:
    """[columns, ...] -> [panels, width, ...], zero-padded."""
    panels = -(-len(weight) // width)
    padded = torch.zeros(panels * width, *weight.shape[1:], dtype=weight.dtype)
    padded[: len(weight)] = weight
    return padded.view(panels, width, *weight.shape[1:])


def _along_panels(panels: torch.Tensor) -> torch.Tensor:
    """[panels, width, k] -> as PackedLinear.packed."""
    if panels.dtype == torch.float32:
        return panels.transpose(1, 2).contiguous()
    even = F.pad(panels, (0, 1)) if panels.shape[2] % 2 else panels
    return even.view(*even.shape[:2], -1, 2).transpose(1, 2).contiguous()


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def usable_sets() -> list[str]:
    """Of INSTRUCTION_SETS those that this machine has, the best first."""
    names = list(INSTRUCTION_SETS)
    capability = torch.backends.cpu.get_cpu_capability()
    usable = names[names.index(capability) :] if capability in names else []
    if capability != "AVX512" or not hasattr(torch.cpu, "get_capabilities"):  # older torch does not tell
        return usable
    return [ROUNDING, *usable] if torch.cpu.get_capabilities().get("avx512_bf16", False) else usable


def built_sets() -> list[str]:
    """Those of them that are built."""
    return [name for name in usable_sets() if library_path(name).exists()]


@functools.cache
def load_kernels(choice: str = "auto", dtype: torch.dtype = torch.float32) -> Kernels | None:
    """`choice`: an instruction set in lower case, or auto: the best one for a model of `dtype` that is built and that this machine
    has. None where there is none. That which rounds to bfloat16 is for models of bfloat16 alone.
    """
    for name in built_sets():
        if choice in ("auto", name.lower()) and (name != ROUNDING or dtype == torch.bfloat16):
            return Kernels(ctypes.CDLL(str(library_path(name))), name)
    return None
