"""A small random Llama, and an engine over it that must be left without a block held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.native import NativeEngine
from tests.engine.rig import (
    Recorder,
    assert_all_free,
    families,
    open_native,
    save_random,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_random(families()["llama"], directory)
    return directory


@pytest.fixture
def native(model_dir: Path) -> Iterator[tuple[NativeEngine, Recorder]]:
    engine, recorder = open_native(model_dir)
    yield engine, recorder
    assert_all_free(engine)
    engine.close()
