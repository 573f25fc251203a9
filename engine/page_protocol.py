"""Owns the part of the Engine protocol that moves pages: those offered to be saved, those opened to be loaded. Torch-free.

Commands and events of `engine.protocol`, which says how they travel.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Content: TypeAlias = Literal["prompt", "chunk"]

# ---- commands, io -> engine


class OfferPages(msgspec.Struct, frozen=True, tag="offer_pages", array_like=True):
    """Offer full pages that enter the prefix index to be saved, at most `limit_blocks` at a time; 0, as before the first of these
    commands: none."""

    limit_blocks: int


class PagesSaved(msgspec.Struct, frozen=True, tag="pages_saved", array_like=True):
    """`blocks` of KvOffered are not read any more, whether they were saved or not."""

    blocks: tuple[int, ...]


class LoadPages(msgspec.Struct, frozen=True, tag="load_pages", array_like=True):
    """Open blocks for the full pages of `token_ids` that the prefix index lacks. Answered at once by PagesOpened; they stay
    reserved until PagesLoaded, and the pages that the index has keep their blocks. token_ids, block_hashes: as in Work.
    "lend": the pages are for a peer, so the answer, which comes once the arena holds them, names the blocks of all of them.
    content: the beginning of a prompt, or a chunk, whose KV is another one although its tokens may be the same."""

    load_id: int
    token_ids: bytes
    block_hashes: bytes
    tenant: bytes = b""
    mode: Literal["load", "lend"] = "load"
    content: Content = "prompt"


class PagesLoaded(msgspec.Struct, frozen=True, tag="pages_loaded", array_like=True):
    """The first `count` opened blocks of `load_id` hold verified KV in every layer and enter the index; nobody writes to any
    of them any more."""

    load_id: int
    count: int


class PagesLate(msgspec.Struct, frozen=True, tag="pages_late", array_like=True):
    """Work that was submitted with `load_id` waits for its pages no longer. The opened blocks stay reserved until PagesLoaded."""

    load_id: int


# ---- events, engine -> io


class OfferedPage(msgspec.Struct, frozen=True, array_like=True):
    """A full page that is final in the arena. unit_keys: of its hash units; tokens: that it was computed from, int32; parent: key
    of the page before it, or empty. ordinal: pages before it in its prompt or chunk."""

    block: int
    unit_keys: bytes
    fingerprint: int
    tokens: bytes
    parent: bytes
    tenant: bytes = b""
    ordinal: int = 0


class KvOffered(msgspec.Struct, frozen=True, tag="kv_offered", array_like=True):
    """These pages keep their bytes until PagesSaved. skipped: pages that were evicted since the last event before
    their turn came: no more than OfferPages allows are on offer at a time."""

    pages: tuple[OfferedPage, ...]
    skipped: int


class PagesOpened(msgspec.Struct, frozen=True, tag="pages_opened", array_like=True):
    """Pages [0, first_page) are in the pool already; `blocks` wait for those after them. Empty: there is no room, or nothing to
    load; PagesLoaded must follow all the same. generations: owner numbers of `blocks`, as in Reserved. held: where those in the
    pool lie, if they are lent."""

    load_id: int
    first_page: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
