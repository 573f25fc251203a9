"""Cutting, merging and coverage of block ranges, tags, layout plans, arena and frames."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.checksums import block_checksums, first_mismatch
from kv_transfer.layout import KvIdentity, LayoutGroup, check_identity, plan_transfer
from kv_transfer.liveness import Liveness
from kv_transfer.segments import Coverage, PendingSpans, Span, SpanCutter, runs_of
from kv_transfer.tags import TagAllocator
from kv_transfer.transports.frames import pack_header, pack_hello, unpack_header, unpack_hello
from pdserve.errors import InternalError, LayoutMismatch, TransferFailed

IDENTITY = KvIdentity(b"\x01" * 32, "tiny", "float32", layers=2, kv_heads=2, head_dim=8)
GROUP = LayoutGroup(page_tokens=16, layer_count=2, head_count=2, block_bytes=2048)


RUNS = st.lists(st.integers(1, 8), min_size=1, max_size=10)


def table(runs: list[int], count: int) -> list[int]:
    """`count` ids, in stretches of adjacent ones as long as `runs`; what is missing is one stretch more."""
    ids = [100 * (len(runs) - ordinal) + offset for ordinal, run in enumerate(runs) for offset in range(run)]
    return (ids + list(range(5000, 5000 + count)))[:count]


@given(RUNS, RUNS, st.integers(1, 9), st.integers(1, 40), st.integers(0, 39), st.integers(1, 40))
def test_pieces_tile_the_span_and_are_contiguous_on_both_sides(
    source_runs: list[int], target_runs: list[int], limit: int, count: int, at: int, length: int
) -> None:
    source, target = table(source_runs, count), table(target_runs, count)
    first = at % count
    span = Span(1, first, min(length, count - first))
    pieces = list(SpanCutter(runs_of(source), runs_of(target), limit).cut(span))
    assert [block for piece in pieces for block in range(piece.first_block, piece.end_block)] == list(
        range(span.first_block, span.end_block)
    )
    for piece in pieces:
        assert piece.layer == 1
        assert 1 <= piece.block_count <= limit
        for ids_of in (source, target):
            ids = ids_of[piece.first_block : piece.end_block]
            assert ids == list(range(ids[0], ids[0] + len(ids)))


def test_as_few_pieces_as_the_runs_allow() -> None:
    cutter = SpanCutter([6, 6], [4, 8], 100)
    assert list(cutter.cut(Span(0, 0, 12))) == [Span(0, 0, 4), Span(0, 4, 2), Span(0, 6, 6)]


def test_tables_of_unequal_length_are_refused() -> None:
    with pytest.raises(InternalError, match="3 blocks at the source, 4 granted"):
        SpanCutter([3], [4], 1)


@given(st.lists(st.integers(0, 300), unique=True, max_size=50))
def test_runs_add_up_to_the_table(ids: list[int]) -> None:
    assert sum(runs_of(ids)) == len(ids)


def test_adjacent_spans_of_a_layer_merge_while_they_wait() -> None:
    pending = PendingSpans()
    for span in (Span(0, 0, 2), Span(0, 2, 1), Span(1, 3, 1), Span(0, 3, 1)):
        pending.add(span)
    assert [pending.pop(), pending.pop(), pending.pop()] == [Span(0, 0, 3), Span(1, 3, 1), Span(0, 3, 1)]
    assert not pending


def test_pending_spans_are_urgent_with_the_last_block_or_when_they_are_many() -> None:
    pending = PendingSpans()
    pending.add(Span(0, 0, 2))
    pending.add(Span(1, 0, 2))
    assert not pending.urgent(end_block=8, many_blocks=5)
    assert pending.urgent(end_block=8, many_blocks=4)
    assert pending.urgent(end_block=2, many_blocks=5)
    pending.add(Span(0, 6, 2))
    assert pending.urgent(end_block=8, many_blocks=100)
    while pending:
        pending.pop()
    assert not pending.urgent(end_block=8, many_blocks=1)


@given(st.permutations([(layer, block) for layer in range(3) for block in range(2, 7)]))
def test_coverage_is_complete_after_each_block_came_once(order: list[tuple[int, int]]) -> None:
    coverage = Coverage(3, 2, 7)
    for layer, block in order:
        assert not coverage.complete
        span = Span(layer, block, 1)
        assert coverage.problem(span) is None
        coverage.add(span)
        assert coverage.problem(span) is not None
    assert coverage.complete


@pytest.mark.parametrize("span", [Span(3, 2, 1), Span(-1, 2, 1), Span(0, 1, 1), Span(0, 6, 2), Span(0, 3, 0)])
def test_spans_outside_of_the_grant_are_problems(span: Span) -> None:
    assert Coverage(3, 2, 7).problem(span) is not None


@given(st.lists(st.integers(1, 1000), max_size=50), st.integers(0, 2**64 - 1), st.integers())
def test_tag_ranges_never_overlap_and_fit_64_bits(counts: list[int], incarnation: int, seed: int) -> None:
    allocator = TagAllocator(incarnation, random.Random(seed))
    end = 0
    for count in counts:
        tags = allocator.allocate(count)
        assert tags.first >= end
        assert tags.count == count
        end = tags.first + tags.count
        assert tags.first in tags
        assert end not in tags
        assert end < 2**64


@pytest.mark.parametrize(
    ("field", "value"), [("kv_dtype", "bfloat16"), ("model", "other"), ("layers", 3), ("head_dim", 16)]
)
def test_unequal_identity_names_both_values(field: str, value: str | int) -> None:
    other = replace(IDENTITY, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch) as caught:
        check_identity(IDENTITY, other)
    assert field in caught.value.message
    assert repr(value) in caught.value.message
    assert repr(getattr(IDENTITY, field)) in caught.value.message


def test_unequal_digests_are_refused_even_if_all_names_agree() -> None:
    with pytest.raises(LayoutMismatch, match="digest"):
        check_identity(IDENTITY, replace(IDENTITY, digest=b"\x02" * 32))


@pytest.mark.parametrize("field", ["page_tokens", "layer_count", "block_bytes", "first_layer", "head_count"])
def test_unequal_layout_names_both_values(field: str) -> None:
    other = replace(GROUP, **{field: 99})  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatch, match=f"{field} is .* at the source and 99 at the destination"):
        plan_transfer([GROUP], [other])


@pytest.mark.parametrize(
    "groups", [[], [GROUP, GROUP], [replace(GROUP, kind="latent")], [replace(GROUP, checksum="crc")]]
)
def test_layouts_without_a_plan_are_refused_by_name(groups: list[LayoutGroup]) -> None:
    with pytest.raises(LayoutMismatch):
        plan_transfer(groups, groups)


def test_a_plan_counts_blocks() -> None:
    plan = plan_transfer([GROUP], [GROUP])
    assert [plan.blocks_for(tokens) for tokens in (1, 16, 17, 32)] == [1, 1, 2, 2]
    assert [plan.cached_blocks(tokens) for tokens in (0, 15, 16, 33)] == [0, 0, 1, 2]


def test_identity_and_layout_survive_the_wire() -> None:
    assert KvIdentity.from_proto(IDENTITY.to_proto()) == IDENTITY
    assert LayoutGroup.from_proto(GROUP.to_proto()) == GROUP


class TestArena:
    SHAPE = ArenaShape(layers=3, blocks=5, block_bytes=64)

    def test_blocks_are_adjacent_within_their_layer(self) -> None:
        arena = Arena.anonymous(self.SHAPE)
        for layer in range(3):
            for block in range(5):
                arena.blocks(layer, block, 1)[:] = bytes([16 * layer + block]) * 64
        assert bytes(arena.blocks(1, 1, 3)) == b"".join(bytes([16 + block]) * 64 for block in (1, 2, 3))
        view = arena.blocks(0, 0, 5)
        assert (view.format, view.contiguous, view.readonly, len(view)) == ("B", True, False, 320)

    @pytest.mark.parametrize(
        ("layer", "first", "count"), [(3, 0, 1), (-1, 0, 1), (0, 5, 1), (0, 4, 2), (0, -1, 1), (0, 0, 0)]
    )
    def test_ranges_outside_are_refused(self, layer: int, first: int, count: int) -> None:
        with pytest.raises(InternalError):
            Arena.anonymous(self.SHAPE).blocks(layer, first, count)

    def test_two_mappings_of_a_descriptor_share_their_bytes(self) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, 3 * 5 * 64)
        one, two = Arena(fd, self.SHAPE), Arena(fd, self.SHAPE)
        os.close(fd)
        one.prefault()
        one.blocks(2, 4, 1)[:] = b"z" * 64
        assert bytes(two.blocks(2, 4, 1)) == b"z" * 64

    def test_a_descriptor_that_is_too_small_is_refused(self) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, 100)
        with pytest.raises(InternalError, match="100 bytes"):
            Arena(fd, self.SHAPE)
        os.close(fd)

    def test_slices_handed_out_outlive_close(self) -> None:
        arena = Arena.anonymous(self.SHAPE)
        view = arena.blocks(0, 0, 1)
        arena.close()
        view[:] = b"y" * 64
        with pytest.raises(InternalError):
            arena.blocks(0, 0, 1)


@given(st.binary(min_size=1, max_size=256), st.integers(0, 10_000), st.integers(0, 7))
def test_one_flipped_bit_is_found_in_its_block(data: bytes, at: int, bit: int) -> None:
    block = 16
    padded = bytearray(data.ljust(-(-len(data) // block) * block, b"\0"))
    expected = block_checksums(memoryview(padded), block)
    assert first_mismatch(memoryview(padded), block, expected) is None
    position = at % len(padded)
    padded[position] ^= 1 << bit
    assert first_mismatch(memoryview(padded), block, expected) == position // block


@given(st.integers(0, 2**64 - 1), st.integers(1, 64 * 2**20))
def test_headers_survive_the_wire(tag: int, length: int) -> None:
    header = unpack_header(pack_header(tag, length))
    assert (header.tag, header.length_bytes) == (tag, length)


@given(st.binary(min_size=20, max_size=20))
def test_random_headers_are_refused_or_in_bounds(data: bytes) -> None:
    try:
        header = unpack_header(data)
    except TransferFailed:
        return
    assert 0 < header.length_bytes <= 64 * 2**20


@given(st.binary(max_size=40))
def test_random_hellos_are_refused(data: bytes) -> None:
    if data[16:] == b"PDKV" and len(data) == 20:
        return
    with pytest.raises(TransferFailed):
        unpack_hello(data)


def test_a_hello_survives_the_wire() -> None:
    assert unpack_hello(pack_hello(b"0123456789abcdef")) == b"0123456789abcdef"


def test_silence_is_counted_in_our_own_beats() -> None:
    liveness = Liveness(misses=3)
    assert all(liveness.beat() for _ in range(6))
    assert not liveness.beat()
    liveness.heard()
    assert liveness.beat()
