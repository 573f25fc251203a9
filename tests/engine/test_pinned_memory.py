"""The arena is registered with the driver for as long as it is mapped, or a reason is logged; what is told is what the driver said."""

from __future__ import annotations

import pytest
import torch

from engine.kv_memory import Arena, DeviceKvMemory
from engine.pinned_memory import PinnedMemory
from tests.engine.test_kv_memory import LAYOUT, SlowLane

CPU = torch.device("cpu")


class RuntimeTwin:
    """Implements CudaRuntime: remembers what is registered, as the driver does, and refuses with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: dict[int, int] = {}
        self.error = 0  # raised at the next launch

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int, /) -> int:  # noqa: N802
        assert flags == 0
        self.error = self.code or (712 if address in self.registered else 0)
        if not self.error:
            self.registered[address] = size_bytes
        return self.error

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        self.error = 0 if self.registered.pop(address, None) else 713
        return self.error

    def forget_error(self) -> None:
        self.error = 0


def pinned(memory: torch.Tensor, runtime: RuntimeTwin) -> PinnedMemory:
    return PinnedMemory(memory, runtime, runtime.forget_error)


def test_memory_is_registered_whole_until_it_is_closed() -> None:
    runtime, memory = RuntimeTwin(), torch.zeros(1000)
    made = pinned(memory, runtime)
    assert runtime.registered == {memory.data_ptr(): 4000}
    assert made.size_bytes == 4000
    made.close()
    made.close()
    assert not runtime.registered
    assert made.size_bytes == 0
    assert not runtime.error


@pytest.mark.parametrize(("code", "words"), [(2, "out of memory"), (801, "not supported"), (999, "see cudaError_t")])
def test_a_refusal_is_logged_with_its_reason_and_leaves_no_error_behind(
    code: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = RuntimeTwin(code)
    made = pinned(torch.zeros(8), runtime)
    (record,) = caplog.records
    assert record.getMessage() == "arena_not_pinned"
    assert words in str(vars(record))
    assert made.size_bytes == 0
    assert not runtime.error
    made.close()


def test_the_memory_of_a_device_tells_what_is_pinned_and_lets_go_of_it_after_its_last_copy() -> None:
    runtime, arena, lane = RuntimeTwin(), Arena(LAYOUT), SlowLane()
    memory = DeviceKvMemory(arena, CPU, lane, SlowLane(), pinned(arena.tensor, runtime))
    assert memory.pinned_bytes == arena.tensor.nbytes
    memory.pool.fill_(2.0)
    told: list[int] = []
    memory.publish(1, [3, 4], lambda: told.append(1))
    memory.close()
    assert not lane.waiting
    assert torch.equal(arena.tensor[1, 3:5], memory.pool[1, 3:5])
    assert not told
    assert not runtime.registered


def test_the_next_memory_at_the_same_addresses_is_registered_again() -> None:
    runtime, memory = RuntimeTwin(), torch.zeros(16)
    first = pinned(memory, runtime)
    assert pinned(memory, runtime).size_bytes == 0
    first.close()
    assert pinned(memory, runtime).size_bytes == 64
