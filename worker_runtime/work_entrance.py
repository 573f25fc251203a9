"""Owns how work enters the engine: straight, or through the tiers (`worker_runtime.page_tiers`)."""

from __future__ import annotations

from typing import Protocol

from engine.page_protocol import KvOffered, PagesLoaded, PagesOpened, PagesSaved
from engine.protocol import Cancel, Dispatch, Submit
from worker_runtime.engine_link import EngineLink


class WorkEntrance(Protocol):
    def submit(self, command: Submit) -> None:
        """Sends `command` to the engine, now or soon."""

    def cancel_choices(self, dispatch: Dispatch, choices: tuple[int, ...]) -> None:
        """Cancels some choices of a submitted dispatch."""

    def computes(self, token_s: float) -> None:
        """How long the engine takes for a token of a prompt."""

    def offered(self, event: KvOffered) -> None: ...

    def opened(self, event: PagesOpened) -> None: ...


class DirectEntrance:
    """A worker without tiers."""

    def __init__(self, engine: EngineLink) -> None:
        self._engine = engine

    def submit(self, command: Submit) -> None:
        self._engine.send(command)

    def cancel_choices(self, dispatch: Dispatch, choices: tuple[int, ...]) -> None:
        self._engine.send(Cancel(dispatch, choices))

    def computes(self, token_s: float) -> None:
        pass  # nothing is decided by it

    def offered(self, event: KvOffered) -> None:
        self._engine.send(PagesSaved(tuple(page.block for page in event.pages)))

    def opened(self, event: PagesOpened) -> None:
        self._engine.send(PagesLoaded(event.load_id, 0))
