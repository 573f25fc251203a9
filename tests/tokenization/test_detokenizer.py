from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenization.detokenizer import Detokenizer
from tokenization.tokenizer import Tokenizer, ids_from_bytes

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def _fold(tokenizer: Tokenizer, parts: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.feed, parts)) + detokenizer.flush()


@SHARED
@given(data=st.data())
def test_any_split_of_the_ids_gives_the_same_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    parts = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert _fold(tokenizer, parts) == _fold(tokenizer, [[token] for token in ids]) == _fold(tokenizer, [ids])


@SHARED
@given(text=st.text(max_size=60))
def test_streamed_text_never_splits_a_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = ids_from_bytes(tokenizer.encode(text, add_special_tokens=False))
    shown = ""
    for token in ids:
        shown += detokenizer.feed([token])
        assert (" " + text).startswith(shown) or text.startswith(shown)
    assert shown + detokenizer.flush() in (text, " " + text)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = ids_from_bytes(tokenizer.encode("🜁", add_special_tokens=False))
    pieces = [piece for token in ids if (piece := detokenizer.feed([token]))]
    assert pieces[-1] == "🜁"


def test_an_unfinished_character_is_replaced_at_the_end_only(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = ids_from_bytes(tokenizer.encode("🜁", add_special_tokens=False))[:-1]
    assert detokenizer.feed(ids).strip() == ""
    assert detokenizer.flush() == "�"


def test_a_character_that_the_prompt_began_is_completed(tokenizer: Tokenizer) -> None:
    ids = ids_from_bytes(tokenizer.encode("🜁", add_special_tokens=False))
    assert Detokenizer(tokenizer, prompt_tail=ids[:-1]).feed(ids[-1:]) == "🜁"


def test_special_tokens_neither_show_nor_cut_a_character(tokenizer: Tokenizer) -> None:
    ids = ids_from_bytes(tokenizer.encode("🜁", add_special_tokens=False))
    end = tokenizer.eos_token_ids[0]
    assert _fold(tokenizer, [[*ids[:-1], end, ids[-1], end]]).strip() == "🜁"


def test_a_long_run_of_invalid_bytes_does_not_pile_up(tokenizer: Tokenizer) -> None:
    first = ids_from_bytes(tokenizer.encode("🜁", add_special_tokens=False))[-1]
    detokenizer = Detokenizer(tokenizer)
    assert sum(len(detokenizer.feed([first])) for _ in range(10_000)) >= 9_997
