"""What nixl connections say on their socket, however the bytes are cut; without the library."""

from __future__ import annotations

import struct

import pytest

from kv_transfer.transports.nixl_frames import Frame, FrameReader, Said, pack
from pdserve.errors import TransferFailed

FRAMES = [
    Frame(Said.MEET, attached=b"who I am"),
    Frame(Said.OFFER, tag=2**63, address=2**47, length_bytes=4 * 2**20, attached=b"a key"),
    Frame(Said.OFFER, tag=7, address=4096, length_bytes=1),
    Frame(Said.TAKEN, tag=7),
]


@pytest.mark.parametrize("cut", [1, 7, 29, 1000])
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(cut: int) -> None:
    stream = b"".join(map(pack, FRAMES))
    reader = FrameReader()
    heard = [frame for at in range(0, len(stream), cut) for frame in reader.feed(stream[at : at + cut])]
    assert heard == FRAMES


@pytest.mark.parametrize(
    "header",
    [
        (b"XXXX", 3, 0, 0, 0, 0),
        (b"PDN1", 9, 0, 0, 0, 0),
        (b"PDN1", 2, 1, 1, 2**27, 0),
        (b"PDN1", 2, 1, 1, 0, 0),
        (b"PDN1", 1, 0, 0, 0, 2**20),
    ],
    ids=["magic", "kind", "huge", "empty", "attachment"],
)
def test_what_is_no_frame_is_refused(header: tuple[bytes, int, int, int, int, int]) -> None:
    with pytest.raises(TransferFailed, match="Malformed"):
        list(FrameReader().feed(struct.pack("<4sBQQII", *header)))
