"""docs/config.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from service_kit.config import ClusterConfig
from service_kit.config_docs import document

ROOT = Path(__file__).resolve().parent.parent.parent


def test_docs_config_is_what_the_generator_writes_now() -> None:
    assert (ROOT / "docs/config.md").read_text() == document(), "python -m service_kit.config_docs > docs/config.md"


def test_every_setting_is_listed_with_a_description() -> None:
    text = document()
    for name, info in ClusterConfig.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for field, field_info in section.model_fields.items():
                assert f"`{name}.{field}`" in text
                assert field_info.description, f"{name}.{field}"
        else:
            assert f"`{name}`" in text
            assert info.description, name
