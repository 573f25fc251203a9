"""The hand-off benchmark with a modelled engine in place of the native one: both parts, over a real destination process."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from benchmarks.handoff import PrefillRun, bytes_part, overlap_part, setup_of
from benchmarks.handoff_source import handoff_source
from engine.protocol import Layout
from simulator.cost_model import CostModel
from simulator.inline_link import InlineEngineLink
from simulator.modelled_engine import ModelledConfig

LAYOUT = Layout(layers=4, blocks=300, page_tokens=16, kv_heads=1, head_dim=64, dtype="float32", block_bytes=8192)


@pytest.mark.slow
async def test_both_parts_measure_every_size_over_a_real_destination() -> None:
    cost = CostModel(0.01, 0.00002, 0.0, 0.0, 0.0)
    link = InlineEngineLink(replace(ModelledConfig(), layout=LAYOUT, kv_bytes=False, cost=cost))
    setup = msgspec.structs.replace(setup_of(link.ready), transports=("tcp",))
    async with handoff_source(setup, link.arena) as source:
        overlap = await overlap_part(PrefillRun(link, source), ("tcp",), rounds=1)
        moved = await bytes_part(source, link.arena, setup, rounds=1)
    await link.close()
    assert [item.name for item in moved] == ["tcp: 512 tokens (1 MB)", "tcp: 2048 tokens (4 MB)"]
    assert len(overlap) == 4 * 4  # prompts, figures of each
    assert all(item.figure.median > 0 and item.peer is not None for item in (*overlap, *moved))
