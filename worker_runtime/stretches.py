"""Owns how prompts and chunks are cut into stretches: whole pages that may be loaded one after the other. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from engine.page_protocol import Content, LoadPages
from engine.prefix_index import KeyChain
from engine.protocol import ChunkSpan, EngineReady, Work
from kv_store.page import PageId
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chunk_seed, fingerprint_seed, padded_chunk


@dataclass(frozen=True, slots=True)
class Stretch:
    """The beginning of a prompt, or a chunk. token_ids: int32, of all `ids`. keys: of its hash units."""

    token_ids: bytes
    keys: bytes
    tenant: bytes
    ids: list[PageId]
    content: Content = "prompt"

    @property
    def in_parts(self) -> bool:
        """Whether the first pages are worth loading without the others."""
        return self.content == "prompt"

    def first(self, pages: int) -> Stretch:
        token_ids = self.token_ids[: len(self.token_ids) // max(1, len(self.ids)) * pages]
        return Stretch(token_ids, self.keys, self.tenant, self.ids[:pages], self.content)

    def to_load(self, load_id: int) -> LoadPages:
        return LoadPages(load_id, self.token_ids, self.keys, self.tenant, content=self.content)

    def to_lend(self, load_id: int) -> LoadPages:
        return LoadPages(load_id, self.token_ids, self.keys, self.tenant, "lend", self.content)


class StretchCutter:
    def __init__(self, ready: EngineReady) -> None:
        self._page_tokens = ready.layout.page_tokens
        self._seed = fingerprint_seed(ready.identity)

    def prefix(self, work: Work) -> Stretch:
        # The last token is always computed, for its logits; pages beyond the given keys are looked up by nobody.
        given_tokens = len(work.block_hashes) // HASH_BYTES * HASH_UNIT_TOKENS
        count = min(len(work.token_ids) // TOKEN_BYTES - 1, given_tokens) // self._page_tokens
        return self.cut(work.token_ids, work.block_hashes, work.tenant, count)

    def chunk(self, work: Work, chunk: ChunkSpan) -> Stretch:
        content = work.token_ids[chunk.start * TOKEN_BYTES : (chunk.start + chunk.count) * TOKEN_BYTES]
        padded = padded_chunk(content, self._page_tokens)
        count = len(padded) // TOKEN_BYTES // self._page_tokens
        return self.cut(padded, chunk.keys, work.tenant, count, "chunk")

    def cut(self, token_ids: bytes, keys: bytes, tenant: bytes, count: int, content: Content = "prompt") -> Stretch:
        """The first `count` pages of these tokens."""
        tokens = array("i", token_ids[: count * self._page_tokens * TOKEN_BYTES])
        seed = self._seed if content == "prompt" else chunk_seed(self._seed)
        pages = KeyChain(self._page_tokens, keys, seed, tenant).pages(tokens, count)
        ids = [PageId(page.key, page.fingerprint, page.tokens) for page in pages]
        return Stretch(tokens.tobytes(), keys, tenant, ids, content)
