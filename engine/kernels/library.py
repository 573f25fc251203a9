"""Owns the loaded kernels: checked calls of the C++ library on torch tensors. See kernels.cpp for what they promise."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from engine.kernels.build import INSTRUCTION_SETS, library_path

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # enum Element of kernels.cpp


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


class Kernels:
    """`panel`: columns of a packed weight's panel; `lanes`: head dimensions must be multiples of it; `chunk`: keys of a partial."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self._library = library
        self.instruction_set = instruction_set
        self.panel = int(library.kernels_panel())
        self.lanes = int(library.kernels_lanes())
        self.chunk = int(library.kernels_chunk())

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """[columns, k] float32 or bfloat16 -> [panels, k, panel], zero-padded."""
        columns, k_count = weight.shape
        panels = -(-columns // self.panel)
        padded = torch.zeros(panels * self.panel, k_count, dtype=weight.dtype)
        padded[:columns] = weight
        return padded.view(panels, self.panel, k_count).transpose(1, 2).contiguous()

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, columns: int) -> torch.Tensor:
        """x [rows, k] float32 -> [rows, columns] float32."""
        x = x.contiguous()
        rows, k_count = x.shape
        assert x.dtype == torch.float32
        assert packed.shape[1] == k_count
        out = torch.empty(rows, columns)
        self._library.kernels_linear(
            _pointer(x), _long(rows), _pointer(packed), _ELEMENTS[packed.dtype], _long(k_count),
            _pointer(bias) if bias is not None else None, _pointer(out), _long(columns),
        )  # fmt: skip
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

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, 2 * count] contiguous float32 -> silu(first half) * second half [rows, count]."""
        assert gate_up.is_contiguous()
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
        self._library.kernels_gate(_pointer(gate_up), _long(len(out)), _long(out.shape[1]), _pointer(out))
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
        """query [rows, heads, dim] float32, pool of one layer [block, 2, page token, kv_head, dim] -> [rows, heads, dim]."""
        rows, heads, dim = query.shape
        _, _, page_tokens, kv_heads, pool_dim = pool.shape
        assert query.dtype == torch.float32
        assert query.stride()[1:] == (dim, 1)
        assert pool.is_contiguous()
        assert dim == pool_dim
        assert not dim % self.lanes
        output = torch.empty(rows, heads, dim)
        partial = torch.empty(tasks.slot_count, heads, dim)
        partial_lse = torch.empty(tasks.slot_count, heads)
        call = _Attention(
            query.data_ptr(), query.stride(0), pool.data_ptr(), _ELEMENTS[pool.dtype], heads, kv_heads, dim, page_tokens,
            dim**-0.5, tasks.begins.data_ptr(), tasks.ends.data_ptr(), len(tasks.task_rows), tasks.task_rows.data_ptr(),
            tasks.task_counts.data_ptr(), tasks.task_blocks.data_ptr(), tasks.task_chunks.data_ptr(),
            tasks.task_slots.data_ptr(), tasks.rows.data_ptr(), tasks.blocks.data_ptr(), tasks.slots.data_ptr(),
            partial.data_ptr(), partial_lse.data_ptr(), output.data_ptr(),
        )  # fmt: skip
        self._library.kernels_attention(
            ctypes.byref(call),
            _pointer(tasks.merged_rows),
            _pointer(tasks.merged_starts),
            len(tasks.merged_rows),
        )
        return output


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


@functools.cache
def load_kernels() -> Kernels | None:
    """The best library that is built and that this machine can run; None where there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = list(INSTRUCTION_SETS)
    if capability not in names:
        return None
    for name in names[names.index(capability) :]:
        path = library_path(name)
        if path.exists():
            return Kernels(ctypes.CDLL(str(path)), name)
    return None
