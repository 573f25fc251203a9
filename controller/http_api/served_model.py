"""Owns the check that a client asks for the model that is served. Pure."""

from __future__ import annotations

from controller.operations import ModelInfo
from pdserve.errors import ModelNotFound


def check_model(asked: str | None, model: ModelInfo) -> None:
    """Raises ModelNotFound. None = the only model there is."""
    if asked is not None and asked != model.name:
        raise ModelNotFound(
            f"The model {asked[:200]!r} is not served here. Ask for {model.name!r} (see /v1/models).", param="model"
        )
