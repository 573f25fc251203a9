"""Owns the cut of many rows into tiles for the linear layers: a tile's activations stay in the caches while weights pass by."""

from __future__ import annotations

from collections.abc import Callable

import torch

_TILE_ROWS = 512


def in_tiles(call: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """`call` of tensors of n rows each -> [n, ...]; each row's result depends on that row only."""
    if len(rows[0]) <= _TILE_ROWS:
        return call(*rows)
    return torch.cat([call(*tile) for tile in zip(*(torch.split(tensor, _TILE_ROWS) for tensor in rows), strict=True)])
