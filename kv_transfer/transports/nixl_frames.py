"""Owns the wire format of what nixl connections say on their socket: who one is, what lies where, what was fetched. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from kv_transfer.transports.frames import MAX_FRAME_BYTES
from pdserve.errors import TransferFailed

_HEADER = struct.Struct("<4sBQQII")
_MAGIC = b"PDN1"
_MAX_ATTACHED_BYTES = 64 * 1024


class Said(IntEnum):
    MEET = 1  # attached: the agent's metadata
    OFFER = 2  # message `tag` lies at `address`; attached: metadata of its memory, where it is new to the peer
    TAKEN = 3  # the buffer of message `tag` may be reused


@dataclass(frozen=True, slots=True)
class Frame:
    said: Said
    tag: int = 0
    address: int = 0
    length_bytes: int = 0
    attached: bytes = b""


def pack(frame: Frame) -> bytes:
    header = _HEADER.pack(_MAGIC, frame.said, frame.tag, frame.address, frame.length_bytes, len(frame.attached))
    return header + frame.attached


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Raises TransferFailed for what is no frame."""
        self._held += data
        while len(self._held) >= _HEADER.size:
            magic, said, tag, address, length_bytes, attached_bytes = _HEADER.unpack_from(self._held)
            if magic != _MAGIC or said not in Said.__members__.values():
                raise TransferFailed(f"Malformed KV frame: {magic!r}, kind {said}.")
            if attached_bytes > _MAX_ATTACHED_BYTES or length_bytes > MAX_FRAME_BYTES:
                raise TransferFailed(f"Malformed KV frame: {length_bytes} bytes, {attached_bytes} attached.")
            if said == Said.OFFER and not length_bytes:
                raise TransferFailed("Malformed KV frame: an empty message.")
            end = _HEADER.size + attached_bytes
            if len(self._held) < end:
                return
            attached = bytes(self._held[_HEADER.size : end])
            del self._held[:end]
            yield Frame(Said(said), tag, address, length_bytes, attached)
