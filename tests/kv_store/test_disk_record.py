from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kv_store.disk.record import (
    Record,
    header_failure,
    pack_header,
    pack_page,
    payload_hash,
    unpack_header,
    unpack_page,
)
from kv_store.news import News
from kv_store.page import Page, PageId
from kv_store.tier import Change
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of, tokens_of

LONGEST_S = 60.0
RECORD = Record(page_of(3, b"tenant"), SMALL.digest(), SMALL.size_bytes, b"h" * 16, 1234.5, 2**40)


def packed_record() -> bytearray:
    block = bytearray(4096)
    pack_header(RECORD, memoryview(block))
    return block


@pytest.mark.parametrize(
    "page",
    [
        page_of(1),
        page_of(0),
        Page(PageId(key_of(9), 2**64 - 1, b"t" * 1024), tenant=b"t" * 64, saving_s=0.25),
        Page(PageId(key_of(9), 0, b"i" * 64), parent=key_of(8), unit_keys=b"u" * 64),
    ],
)
def test_a_page_comes_back_as_it_was_packed(page: Page) -> None:
    assert unpack_page(pack_page(page)) == page


def test_a_header_comes_back_as_it_was_packed() -> None:
    assert unpack_header(memoryview(packed_record())) == RECORD


def test_a_header_has_nothing_of_what_was_in_its_memory_before() -> None:
    block = bytearray(b"\xff" * 4096)
    pack_header(RECORD, memoryview(block))
    assert block == packed_record()


def test_every_flipped_bit_of_a_header_shows() -> None:
    block = packed_record()
    for offset in range(0, 4096, 5):
        block[offset] ^= 1 << offset % 8
        assert unpack_header(memoryview(block)) is None
        block[offset] ^= 1 << offset % 8
    assert unpack_header(memoryview(block)) == RECORD


def test_a_block_of_zeros_is_no_header() -> None:
    assert unpack_header(memoryview(bytes(4096))) is None


def test_a_header_is_refused_for_what_differs() -> None:
    page_id, digest, size_bytes = RECORD.page.id, SMALL.digest(), SMALL.size_bytes
    assert header_failure(RECORD, page_id, digest, size_bytes) is None
    assert header_failure(None, page_id, digest, size_bytes) == "header"
    assert header_failure(RECORD, page_id, b"x" * 16, size_bytes) == "identity"
    assert header_failure(RECORD, replace(page_id, key=key_of(77)), digest, size_bytes) == "identity"
    assert header_failure(RECORD, replace(page_id, fingerprint=1), digest, size_bytes) == "fingerprint"
    assert header_failure(RECORD, replace(page_id, tokens=tokens_of(4)), digest, size_bytes) == "fingerprint"
    assert header_failure(RECORD, page_id, digest, size_bytes + 1) == "length"


def test_the_hash_of_rows_is_the_hash_of_the_whole() -> None:
    content = bytes_of(5)
    assert payload_hash([row.data for row in content]) == payload_hash([content.reshape(-1).data])


# ---- news


def test_a_listener_that_changes_the_tier_again_hears_of_it_afterwards() -> None:
    happened: list[tuple[Change, Page]] = [("stored", page_of(0))]
    heard: list[tuple[Change, int]] = []

    def take() -> list[tuple[Change, Page]]:
        taken = list(happened)
        happened.clear()
        return taken

    def listener(change: Change, pages: Sequence[Page]) -> None:
        heard.append((change, len(pages)))
        if change == "stored":
            happened.extend([("evicted", page_of(0)), ("evicted", page_of(1))])
            news.tell()

    news = News(take, listener)
    news.tell()
    assert heard == [("stored", 1), ("evicted", 2)]


def test_news_of_many_threads_are_told_in_the_order_in_which_they_happened() -> None:
    lock = threading.Lock()
    happened: list[tuple[Change, Page]] = []
    order: list[int] = []
    heard: list[int] = []

    def take() -> list[tuple[Change, Page]]:
        with lock:
            taken = list(happened)
            happened.clear()
        return taken

    news = News(take, lambda change, pages: heard.extend(page.id.fingerprint for page in pages))

    def change_much(thread: int) -> None:
        for number in range(200):
            with lock:
                fingerprint = thread * 1000 + number
                order.append(fingerprint)
                happened.append(("stored", Page(PageId(key_of(0), fingerprint, b""))))
            news.tell()

    threads = [threading.Thread(target=change_much, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_S)
    assert not any(thread.is_alive() for thread in threads)
    assert heard == order
