"""Owns what the processes of the kill tests agree on."""

from __future__ import annotations

from tests.kv_transfer.rig import Geometry

CONFIG: dict[str, float] = {"heartbeat_s": 0.5, "lease_s": 10.0, "connect_s": 5.0, "max_message_bytes": 1 << 20}
GEOMETRY = Geometry(layers=4, blocks=128, block_bytes=1 << 18)  # 32 MB a layer
