"""What one choice has brought: text is a fold over ids, whatever the reader takes at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.choice_output import ChoiceOutput
from controller.lifecycle import Token
from controller.request import FinishReason, GenerationRequest, SamplingSpec
from tests.controller.cluster_twin import ByteVocabulary


def output(
    prompt: bytes = b"p", *, stop: tuple[str, ...] = (), include: bool = False, sampling: SamplingSpec | None = None
) -> ChoiceOutput:
    ids = b"".join(byte.to_bytes(4, "little") for byte in prompt)
    request = GenerationRequest("r", ids, sampling or SamplingSpec(100, 0), stop=stop, include_stop_text=include)
    return ChoiceOutput(request, ByteVocabulary())


def feed(into: ChoiceOutput, data: bytes, finish: FinishReason | None = "length") -> ChoiceOutput:
    for index, byte in enumerate(data):
        last = index == len(data) - 1
        if into.accept(Token(1, index, byte, finish if last else None)):
            break
    return into


def text(of: ChoiceOutput) -> str:
    return "".join(of.pieces)


def test_a_character_is_never_split() -> None:
    data = "aß€😀".encode()
    done = feed(output(), data)
    assert text(done) == "aß€😀"
    assert [piece for piece in done.pieces if piece] == ["a", "ß", "€", "😀"]


def test_a_character_that_the_prompt_began_is_completed() -> None:
    euro = "€".encode()
    assert text(feed(output(b"x" + euro[:2]), euro[2:] + b"!")) == "€!"


def test_an_unfinished_character_comes_at_the_end_as_a_replacement() -> None:
    assert text(feed(output(), b"a" + "€".encode()[:2])) == "a�"


def test_text_stops_before_the_stop_string_or_after_it() -> None:
    done = feed(output(stop=("cd",)), b"abcdef")
    assert (text(done), done.finish_reason, done.stop_reason) == ("ab", "stop", "cd")
    assert len(done.token_ids) == 4
    assert text(feed(output(stop=("cd",), include=True), b"abcdef")) == "abcd"


def test_what_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    assert text(feed(output(stop=("cdX",)), b"abcd")) == "abcd"


def test_stop_strings_wait_for_min_tokens() -> None:
    sampling = SamplingSpec(100, 0, min_tokens=4)
    done = feed(output(stop=("b",), sampling=sampling), b"abcabc")
    assert text(done) == "abca"


def test_the_end_token_is_no_text_and_has_no_name() -> None:
    done = feed(output(), b"ab\x00", "stop")
    assert (text(done), done.stop_reason) == ("ab", None)


def test_a_stop_id_is_named() -> None:
    done = feed(output(sampling=SamplingSpec(100, 0, stop_token_ids=(99,))), b"abc", "stop")
    assert (text(done), done.stop_reason) == ("ab", 99)


@given(st.text(max_size=30), st.lists(st.integers(0, 40), max_size=6), st.sampled_from([(), ("a",), ("ab", "é")]))
def test_deltas_from_any_cuts_add_up_to_the_whole(whole: str, cuts: list[int], stop: tuple[str, ...]) -> None:
    data = whole.encode() or b"x"
    reference = feed(output(stop=stop), data)
    live, taken, ids = output(stop=stop), "", list[int]()
    for index, byte in enumerate(data):
        stopped = live.accept(Token(1, index, byte, "length" if index == len(data) - 1 else None))
        if index in cuts or stopped or index == len(data) - 1:
            delta = live.delta(0, len(ids))
            taken += delta.text
            ids.extend(delta.token_ids)
        if stopped:
            break
    assert taken == text(reference)
    assert ids == reference.token_ids
