"""Owns what is used of `nixl`: agents, registered memory, reads. The only file that imports it.

NIXL's own progress thread burns a core per agent while nothing moves, so it stays off: `pump.Pump` drives the agents.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from kv_transfer.transport import Buffer
from kv_transfer.transports.ucx_profiles import apply_profile
from pdserve.errors import ConfigInvalid, TransferFailed

# cma reads a process's memory in one step: see `nixl_reach`. An operator's UCX_TLS may lack it, so it does not count here.
_HOST_TLS = "cma,posix,self,tcp"


class _Handle(Protocol):
    def release(self) -> None: ...


class _Nixl(Protocol):
    """nixl_agent, as far as it is used; lists of descriptors are the library's own and only passed on."""

    def register_memory(self, reg_list: list[tuple[int, int, int, str]], mem_type: str) -> object: ...

    def deregister_memory(self, dereg_list: object) -> None: ...

    def get_agent_metadata(self) -> bytes: ...

    def get_partial_agent_metadata(self, descs: object, inc_conn_info: bool) -> bytes: ...

    def add_remote_agent(self, metadata: bytes) -> bytes | str: ...

    def remove_remote_agent(self, agent: bytes | str) -> None: ...

    def get_xfer_descs(self, descs: list[tuple[int, int, int]], mem_type: str) -> object: ...

    def initialize_xfer(self, operation: str, local: object, remote: object, agent: bytes | str) -> _Handle: ...

    def transfer(self, handle: _Handle) -> str: ...

    def check_xfer_state(self, handle: _Handle) -> str: ...

    def get_new_notifs(self) -> dict[str, list[bytes]]: ...


def address_of(buffer: Buffer | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of one agent. `metadata` tells a peer how to read it."""

    descriptors: object
    metadata: bytes


class Read:
    """One fetch of a peer's memory. Released before its agent is dropped."""

    def __init__(self, nixl: _Nixl, handle: _Handle) -> None:
        self._nixl = nixl
        self._handle = handle
        self._state = nixl.transfer(handle)

    def came(self) -> bool:
        """True when all bytes are there. Raises TransferFailed, or one of the library's errors, when they never will be."""
        if self._state == "PROC":
            self._state = self._nixl.check_xfer_state(self._handle)
        if self._state == "ERR":
            raise TransferFailed("NIXL says that the read failed.")
        return self._state == "DONE"

    def release(self) -> None:
        self._handle.release()


class Agent:
    """An agent for one peer alone, so that a lost peer costs nobody else. When `drop` returns, no memory is touched any more."""

    def __init__(self, nixl: _Nixl) -> None:
        self._nixl: _Nixl | None = nixl
        self._peer: bytes | str = ""

    def _open(self) -> _Nixl:
        if self._nixl is None:
            raise TransferFailed("KV connection is closed.")
        return self._nixl

    def metadata(self) -> bytes:
        return self._open().get_agent_metadata()

    def learn(self, metadata: bytes) -> None:
        """Who the peer is, and what more of its memory can be read."""
        self._peer = self._open().add_remote_agent(metadata)

    def register(self, memory: Buffer | mmap.mmap) -> Region:
        nixl = self._open()
        descriptors = nixl.register_memory([(address_of(memory), len(memory), 0, "")], "DRAM")
        return Region(descriptors, nixl.get_partial_agent_metadata(descriptors, True))

    def forget(self, region: Region) -> None:
        if self._nixl is not None:
            self._nixl.deregister_memory(region.descriptors)

    def read(self, target: Buffer, address: int) -> Read:
        nixl = self._open()
        local = nixl.get_xfer_descs([(address_of(target), len(target), 0)], "DRAM")
        remote = nixl.get_xfer_descs([(address, len(target), 0)], "DRAM")
        return Read(nixl, nixl.initialize_xfer("READ", local, remote, self._peer))

    def progress(self) -> None:
        if self._nixl is not None:
            self._nixl.get_new_notifs()

    def drop(self) -> None:
        """All reads were released before, and nobody keeps them: they hold the library's agent."""
        nixl, self._nixl = self._nixl, None
        if nixl is not None and self._peer:
            nixl.remove_remote_agent(self._peer)


class NixlLibrary:
    """`direct`: peers must let their memory be read by process_vm_readv."""

    def __init__(
        self, make_agent: Callable[[str], _Nixl], errors: tuple[type[Exception], ...], *, direct: bool
    ) -> None:
        self._make_agent = make_agent
        self.errors = errors
        self.direct = direct

    def open_agent(self) -> Agent:
        return Agent(self._make_agent(secrets.token_hex(16)))


@functools.cache
def load_library(profile: str) -> NixlLibrary:
    """Raises ConfigInvalid where nixl is not installed. Its UCX reads `profile` once per process: the first one holds."""
    if profile == "tcp":
        raise ConfigInvalid(
            "transfer.transport nixl needs transfer.profile host or rdma: over tcp a lost peer ends the process."
        )
    if profile == "host":
        os.environ["UCX_TLS"] = _HOST_TLS
    apply_profile(profile)
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")  # more than that goes to stdout, where others speak
    try:
        api = importlib.import_module("nixl._api")
        bindings = importlib.import_module("nixl._bindings")
    except ImportError as error:
        message = f"transfer.transport is nixl, but nixl cannot be imported ({error}): pip install 'pdserve[nixl]'."
        raise ConfigInvalid(message) from error
    settings = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    named = (value for name, value in vars(bindings).items() if name.startswith("nixl") and name.endswith("Error"))
    errors = (*named, TransferFailed, OSError, ValueError)
    library = NixlLibrary(lambda name: cast(_Nixl, api.nixl_agent(name, settings)), errors, direct=profile == "host")
    library.open_agent()  # a process's first agent takes 0.4 s of its loop, each one after it 10 ms
    return library
