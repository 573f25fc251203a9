"""Owns what the processes of the kill tests agree on."""

from __future__ import annotations

from tests.kv_transfer.rig import Geometry

# Long enough for a process that gets no turn for seconds on a busy machine: it is neither silent nor away.
CONFIG: dict[str, float] = {
    "heartbeat_s": 0.5,
    "heartbeat_misses": 6,
    "lease_s": 60.0,
    "connect_s": 30.0,
    "max_message_bytes": 1 << 20,
}
GEOMETRY = Geometry(layers=4, blocks=128, block_bytes=1 << 18)  # 32 MB a layer
