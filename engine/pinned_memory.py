"""Owns the registration of host memory with the CUDA driver, which lets copies to and from it run beside the host.

Without it copies are right, but the host waits for each. Never run on a GPU so far: tests cover everything but `cuda_pinned`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, SupportsInt

import torch

from service_kit.logs import get_logger

_log = get_logger(__name__)

# Of cudaError_t, those that a registration is known to give.
_REASONS = {
    1: "invalid value: the memory is not of whole pages, or not mapped",
    2: "out of memory: the driver could not lock so much (ulimit -l, a memory limit of the container)",
    712: "already registered",
    801: "not supported: this system does not register memory of other allocators",
}


class CudaRuntime(Protocol):
    """What torch.cuda.cudart() gives. Results are values of cudaError_t; 0 = done."""

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int, /) -> SupportsInt: ...  # noqa: N802

    def cudaHostUnregister(self, address: int, /) -> SupportsInt: ...  # noqa: N802


class PinnedMemory:
    """Registered from its making until `close`, if the driver does it. forget_error: the runtime keeps an error and raises it once
    more, at the next launch."""

    def __init__(self, memory: torch.Tensor, runtime: CudaRuntime, forget_error: Callable[[], None]) -> None:
        self._memory = memory  # stays mapped for as long as it is registered
        self._runtime = runtime
        self._forget_error = forget_error
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        self.size_bytes = 0 if code else memory.nbytes
        if code:
            forget_error()
            _log.warning("arena_not_pinned", bytes=memory.nbytes, cuda_error=code, reason=_reason(code))
        else:
            _log.info("arena_pinned", bytes=memory.nbytes)

    def close(self) -> None:
        """No copy may be under way. Memory that is unmapped while it is registered blocks its addresses for the next registration."""
        if not self.size_bytes:
            return
        self.size_bytes = 0
        code = int(self._runtime.cudaHostUnregister(self._memory.data_ptr()))
        if code:
            self._forget_error()
            _log.warning("arena_stays_pinned", cuda_error=code, reason=_reason(code))


def _reason(code: int) -> str:
    return _REASONS.get(code, "see cudaError_t in CUDA's documentation")


def cuda_pinned(memory: torch.Tensor, device: torch.device) -> PinnedMemory:
    def forget_error() -> None:
        with suppress(RuntimeError):
            torch.zeros(1, device=device)

    return PinnedMemory(memory, torch.cuda.cudart(), forget_error)  # type: ignore[no-untyped-call]
