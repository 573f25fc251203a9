from __future__ import annotations

import pytest
import tokenizers

from tests.tokenization.fixtures import byte_level_backend, sentencepiece_backend, write_model_dir
from tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=["byte-level", "sentencepiece"])
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return byte_level_backend() if request.param == "byte-level" else sentencepiece_backend()


@pytest.fixture(scope="session")
def tokenizer(backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_model_dir(tmp_path_factory.mktemp("model"), backend))
