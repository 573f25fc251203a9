"""Frames come out whole and in order, however the stream was cut; an oversized one is refused before it is buffered."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_runtime.framing import FrameReader, FrameTooLarge, encode_frame

payloads = st.lists(st.binary(max_size=200), max_size=20)


@given(payloads, st.lists(st.integers(1, 50), max_size=200))
def test_frames_survive_any_split_of_the_stream(sent: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(payload) for payload in sent)
    reader, received, start = FrameReader(), list[bytes](), 0
    for size in [*cuts, len(stream)]:
        received += reader.feed(stream[start : start + size])
        start += size
    assert received == sent


@given(payloads, st.binary(min_size=1, max_size=50))
def test_no_part_of_a_frame_comes_before_its_last_byte(sent: list[bytes], last: bytes) -> None:
    reader = FrameReader()
    stream = b"".join(encode_frame(payload) for payload in [*sent, last])
    assert reader.feed(stream[:-1]) == sent
    assert reader.feed(stream[-1:]) == [last]


@given(st.integers(101, 2**32 - 1))
def test_a_frame_beyond_the_bound_is_refused_by_its_header_alone(size: int) -> None:
    with pytest.raises(FrameTooLarge):
        FrameReader(limit_bytes=100).feed(struct.pack("<I", size))


def test_a_frame_beyond_the_bound_is_not_encoded() -> None:
    with pytest.raises(FrameTooLarge):
        encode_frame(bytes(101), limit_bytes=100)
