"""Owns the frames between the engine and the io process: four little-endian bytes of length, then the payload. Pure."""

from __future__ import annotations

import struct

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 2**20


class FrameTooLarge(ValueError):
    """A frame announced more bytes than the bound: the peer is broken, the link must close."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"a frame of {size_bytes} bytes exceeds the bound of {limit_bytes} bytes")


def encode_frame(payload: bytes, limit_bytes: int = MAX_FRAME_BYTES) -> bytes:
    if len(payload) > limit_bytes:
        raise FrameTooLarge(len(payload), limit_bytes)
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into frames, however the stream was split or joined on its way."""

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pending = bytearray()

    def feed(self, chunk: bytes | memoryview) -> list[bytes]:
        """Payloads of the frames that `chunk` completes, in order. Raises FrameTooLarge before it buffers such a frame."""
        pending = self._pending
        pending += chunk
        frames: list[bytes] = []
        start = 0
        while len(pending) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(pending, start)
            if size > self._limit_bytes:
                raise FrameTooLarge(size, self._limit_bytes)
            end = start + _LENGTH.size + size
            if len(pending) < end:
                break
            frames.append(bytes(pending[start + _LENGTH.size : end]))
            start = end
        del pending[:start]
        return frames
