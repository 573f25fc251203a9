"""Documents that must agree with the code."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from service_kit.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent


def test_the_picture_of_the_architecture_is_the_import_contract() -> None:
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    layers = contract["importlinter:contract:layers"]["layers"].split("\n")
    block = re.search(r"```\n(simulator.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1].strip().split("\n") == [line.strip() for line in layers if line.strip()]


def test_every_metric_of_the_tiers_is_explained_to_operators() -> None:
    told = (ROOT / "docs/kv.md").read_text()
    families = [family.name for family in Metrics("tiny").registry.collect()]
    names = [
        name.removeprefix("pdserve_") for name in families if name.startswith(("pdserve_kv_tier", "pdserve_kv_load"))
    ]
    assert len(names) >= 20
    assert [name for name in names if name not in told] == []


def test_torch_is_pinned_once() -> None:
    pins = [
        f"{path.name}: {line}"
        for path in (ROOT / "requirements").iterdir()
        for line in path.read_text().splitlines()
        if re.match(r"torch[=<>]", line)
    ]
    assert len(pins) == 1, pins


def test_no_unsafe_loader_is_used() -> None:
    pattern = re.compile(r"\bpickle\b|torch\.load\(|yaml\.load\(|trust_remote_code")
    sources = [
        path
        for path in ROOT.glob("*/**/*.py")
        if not {".venv", "build"} & set(path.parts) and path.parts[-2] != "tests"
    ]
    offenders = [str(path) for path in sources if path != Path(__file__) and pattern.search(path.read_text())]
    assert offenders == []


def test_the_tests_that_pages_name_are_there() -> None:
    """Names that follow `…::` belong to the file that was named last."""
    pages = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
    for page, text in pages.items():
        file = ""
        for path, name in re.findall(r"`(tests/[\w/]+\.py|…|test_\w+\.py)(?:::(test_\w+))?`", text):
            if path.startswith("tests/"):
                file = path
            assert path == "…" or any((ROOT / "tests").rglob(Path(path).name)), f"{page.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{page.name}: {file}::{name}"
