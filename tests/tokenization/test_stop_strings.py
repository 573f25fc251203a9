from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization.stop_strings import StopMatcher, StopResult

ALPHABET = "ab\n^]"
TEXT = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=5).map(tuple)


def _oracle(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """The match that ends first; of those the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def _run(parts: list[str], stops: tuple[str, ...], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop=include)
    shown = ""
    for part in parts:
        result = matcher.feed(part)
        shown += result.text
        if result.stop is not None:
            return shown, result.stop
    return shown + matcher.flush(), None


def _split(text: str, cuts: list[int]) -> list[str]:
    ordered = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *ordered], [*ordered, len(text)], strict=True)]


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8), include=st.booleans())
def test_matches_a_naive_search_of_the_whole_text(
    text: str, stops: tuple[str, ...], cuts: list[int], include: bool
) -> None:
    assert _run(_split(text, cuts), stops, include=include) == _oracle(text, stops, include=include)


@given(text=TEXT, stops=STOPS)
def test_holds_back_only_the_longest_suffix_that_may_become_a_stop(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    result = matcher.feed(text)
    if result.stop is None:
        tails = [text[place:] for place in range(len(text))]
        longest = next((tail for tail in tails if any(stop.startswith(tail) for stop in stops)), "")
        assert result.text == text[: len(text) - len(longest)]


def test_without_stop_strings_text_passes() -> None:
    assert StopMatcher(()).feed("anything") == StopResult("anything")


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "a\n\n")])
def test_the_stop_itself_is_shown_only_on_request(include: bool, shown: str) -> None:
    matcher = StopMatcher(("\n\n",), include_stop=include)
    assert matcher.feed("a\n") == StopResult("a")
    assert matcher.feed("\nb") == StopResult(shown[1:], "\n\n")


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(("x",))
    assert matcher.feed("axb") == StopResult("a", "x")
    assert matcher.feed("more") == StopResult("", "x")
    assert matcher.flush() == ""
