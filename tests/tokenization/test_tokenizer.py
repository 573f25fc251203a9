from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from pdserve.errors import InvalidRequest, ModelUnsupported
from tests.tokenization.fixtures import byte_level_backend, write_model_dir
from tokenization.tokenizer import Tokenizer, ids_from_bytes, ids_to_bytes

TEXTS = ["def read(path):\n", "naïve café, 你好, 🙂 and 👩‍👩‍👧", "  the  quick ", "", "the end", "�"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_library_as_little_endian_int32(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, text: str
) -> None:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert ids_from_bytes(encoded) == backend.encode(text, add_special_tokens=False).ids
    assert encoded[:4] == b"" or int.from_bytes(encoded[:4], "little") == ids_from_bytes(encoded)[0]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back_as_the_library_does(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, text: str
) -> None:
    ids = ids_from_bytes(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.decode(ids) == backend.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_say_which_characters_each_token_stands_for(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_from_bytes(tokenizer.encode(text, add_special_tokens=False))
    offsets = tokenizer.offsets(text, add_special_tokens=False)
    assert len(offsets) == len(ids)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    for place, (start, end) in enumerate(offsets):
        told = tokenizer.token_text(
            ids[place]
        ).strip()  # where a space was put in front, it has the first character's place
        assert told in ("", "\N{REPLACEMENT CHARACTER}", text[start:end].strip())


@given(data=st.data())
def test_byte_level_decode_equals_the_library_for_any_ids(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, _BYTE_LEVEL.get_vocab_size() - 1), max_size=30))
    skip = data.draw(st.booleans())
    assert _LOADED.decode(ids, skip_special_tokens=skip) == _BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_skipped_unless_asked_for(tokenizer: Tokenizer, backend: tokenizers.Tokenizer) -> None:
    ids = ids_from_bytes(tokenizer.encode("a<|end|>b", add_special_tokens=False))
    assert tokenizer.decode(ids) == backend.decode(ids)
    assert "<|end|>" not in tokenizer.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "<|end|>"


def test_special_ids_are_known(tokenizer: Tokenizer, backend: tokenizers.Tokenizer) -> None:
    assert tokenizer.eos_token_ids == (backend.token_to_id("<|end|>"),)


def test_padding_rows_of_the_embedding_are_valid_ids_without_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == ""


@pytest.mark.parametrize("wrong", [-1, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{wrong}.*{tokenizer.vocab_size - 1}"):
        tokenizer.decode([1, wrong])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        tokenizer.encode("a\ud800", add_special_tokens=False)


def test_truncation_of_the_training_run_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.load(write_model_dir(tmp_path, backend))
    assert len(ids_from_bytes(tokenizer.encode("xyzxyzxyz", add_special_tokens=True))) == 9


def test_a_decoder_that_is_no_concatenation_is_refused_by_name(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "<|end|>": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelUnsupported, match="WordPiece"):
        Tokenizer.load(write_model_dir(tmp_path, backend))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="another checkpoint"):
        Tokenizer.load(write_model_dir(tmp_path, byte_level_backend(), padding_rows=-1))


def test_a_missing_or_broken_tokenizer_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"decoder": 3}))
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_metaspace_keeps_the_spaces_between_words(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "<|end|>": 3}, [("▁", "a")]))
    backend.decoder = decoders.Metaspace()
    assert Tokenizer.load(write_model_dir(tmp_path, backend)).decode([2, 2, 1]) == "a aa"


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packing_ids_loses_nothing(ids: list[int]) -> None:
    assert ids_from_bytes(ids_to_bytes(ids)) == ids


def _loaded(backend: tokenizers.Tokenizer) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(write_model_dir(Path(folder), backend))


_BYTE_LEVEL = byte_level_backend()
_LOADED = _loaded(_BYTE_LEVEL)
