"""Owns incremental detokenisation: ids to text that never splits a character. Pure.

Text is a fold over ids, token by token: pieces are bytes, and an incremental UTF-8 decoder holds back at most three of them.
So any split of the ids gives the same text, in O(1) per token, without re-decoding a window.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_UTF8 = codecs.getincrementaldecoder("utf-8")


class PieceTable(Protocol):
    """What `Tokenizer` gives: token id -> bytes; special tokens, which are skipped, are empty."""

    @property
    def text_pieces(self) -> Sequence[bytes]: ...


class Detokenizer:
    """One choice's text. Bytes that can no longer become a character turn into U+FFFD, as in HF's byte-level decoder."""

    __slots__ = ("_decoder", "_pieces")

    def __init__(self, table: PieceTable, prompt_tail: Sequence[int] = ()) -> None:
        """`prompt_tail`: the last ids of the prompt (four are enough), so that a character cut there is completed."""
        self._pieces = table.text_pieces
        self._decoder = _UTF8("replace")
        self.feed(prompt_tail)

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; an unfinished character stays inside."""
        pieces = self._pieces
        return self._decoder.decode(b"".join([pieces[token] for token in ids]))

    def flush(self) -> str:
        """The end: what is unfinished becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
