"""One request's readers: whatever comes while one of them is about to look, it is told."""

from __future__ import annotations

import asyncio

import pytest

from controller.lifecycle import Dispatched, Token
from controller.live_request import LiveRequest, Reader
from controller.request import Begun
from controller.timeline import Timeline
from pdserve.errors import DeadlineExceeded
from tests.controller.cluster_twin import ByteVocabulary, asked

AT_ONCE_S = 10.0


async def test_an_error_that_came_with_the_last_tokens_is_raised_after_them() -> None:
    """One wake stands for both: the reader had been woken for the tokens and not looked yet."""
    request = asked()
    live = LiveRequest(1, request, ByteVocabulary(), Timeline.of(request, 0.0, 0.0), 5)
    reader = Reader(live, ())
    live.apply(0, Dispatched(1, split=False), 0.0)
    live.apply(0, Token(1, 0, 97), 0.0)
    live.wake()
    live.fail(DeadlineExceeded("late"), 0.0)
    live.wake()
    async with asyncio.timeout(AT_ONCE_S):
        await reader.wait()
        began, delta = reader.take()
        assert began == Begun(0)
        assert not isinstance(delta, Begun)
        assert delta.token_ids == (97,)
        await reader.wait()
        with pytest.raises(DeadlineExceeded):
            reader.take()
