"""A configured model: a directory, or a hub id that is fetched without pickles and code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from pdserve.errors import ConfigInvalid
from service_kit.hub_model import main, model_directory


class Hub(ModuleType):
    """Takes the place of huggingface_hub: no test fetches anything."""

    def __init__(self, directory: Path, error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.asked: list[tuple[str, list[str]]] = []
        self._directory = directory
        self._error = error

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, allow_patterns))
        if self._error is not None:
            raise self._error
        return str(self._directory)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert model_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["nowhere", "/no/such/dir", "../up", "a/b/c", "~/x"])
def test_a_path_that_is_neither_a_directory_nor_a_hub_id_is_refused(path: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"model\.path"):
        model_directory(path)


def test_a_hub_id_is_fetched_without_pickles_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert model_directory("owner/name") == tmp_path
    assert hub.asked == [("owner/name", ["*.safetensors", "*.json", "*.jinja"])]
    assert main(["owner/name"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_a_model_that_cannot_be_fetched_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, OSError("no route to the hub")))
    assert main(["owner/name"]) == 2
    assert "no route to the hub" in capsys.readouterr().err


def test_without_the_hub_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigInvalid, match="pip install huggingface_hub"):
        model_directory("owner/name")
