"""Owns pages of KV for tests: chains of them, each with bytes of its own that anyone can make again."""

from __future__ import annotations

import hashlib
import random
from array import array
from functools import cache

import numpy as np

from kv_store.page import Page, PageBytes, PageFormat, PageId

SMALL = PageFormat(identity=b"\x11" * 32, page_tokens=32, layers=2, block_bytes=1024)
ALIGNED = PageFormat(identity=b"\x22" * 32, page_tokens=16, layers=2, block_bytes=4096)
CHAIN_PAGES = 4


@cache
def key_of(number: int) -> bytes:
    return hashlib.sha256(f"page {number}".encode()).digest()


@cache
def tokens_of(number: int, page_format: PageFormat = SMALL) -> bytes:
    """Other ones for every page."""
    return array("i", range(number * 1000, number * 1000 + page_format.page_tokens)).tobytes()


@cache
def page_of(number: int, tenant: bytes = b"") -> Page:
    """Pages 0-3 are a chain, 4-7 the next one, and so on."""
    parent = key_of(number - 1) if number % CHAIN_PAGES else b""
    page_id = PageId(key_of(number), number * 7919 + 1, tokens_of(number))
    return Page(page_id, parent, b"u" * 32 + key_of(number), tenant, 0.001 * number)


def bytes_of(number: int, page_format: PageFormat = SMALL) -> PageBytes:
    content = random.Random(number).randbytes(page_format.size_bytes)
    return np.frombuffer(content, dtype=np.uint8).reshape(page_format.layers, page_format.block_bytes).copy()
