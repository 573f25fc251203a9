"""docs/metrics.md lists the metrics that exist, and no other page names one that does not."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.core import Metric

from service_kit.metric_docs import document
from service_kit.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIXES = ("", "_bucket", "_sum", "_count")


def _exposed(family: Metric) -> str:
    """Its name as in queries."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def _names() -> set[str]:
    return {_exposed(family) for family in Metrics("any").registry.collect()}


def test_docs_metrics_is_what_the_generator_writes_now() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == document(), "python -m service_kit.metric_docs > docs/metrics.md"


def test_the_list_has_every_family_of_the_registry_and_nothing_else() -> None:
    rows = [line for line in document().splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`((?:pdserve_|vllm:)\w+)`", row)]
    assert sorted(listed) == sorted(_names())


def test_every_metric_that_a_page_names_exists() -> None:
    known = {name + suffix for name in _names() for suffix in SUFFIXES}
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        named = set(re.findall(r"`((?:pdserve_|vllm:)[a-z_]{3,})[`{]", page.read_text()))
        assert named <= known, page.name


def test_the_page_on_the_tiers_tells_what_each_of_their_metrics_means() -> None:
    table = (ROOT / "docs/kv.md").read_text().partition("## Metrics")[2]
    told = {f"pdserve_{name}" for name in re.findall(r"`(kv_\w+?)(?:`|\{)", table)}
    of_tiers = {name for name in _names() if re.match(r"pdserve_kv_(tier|load|pull|loan|blended)_", name)}
    assert told == of_tiers
