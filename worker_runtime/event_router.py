"""Owns where each engine event goes: to the dispatch's handler, to its owner, to the load board, to the KV index."""

from __future__ import annotations

from typing import assert_never

from engine.page_protocol import KvOffered, PagesOpened
from engine.protocol import (
    EngineReady,
    Event,
    Freed,
    KvEvicted,
    KvReady,
    KvStored,
    Load,
    PrefillDone,
    PromptLogprobs,
    Reserved,
    ReserveRefused,
    Started,
    StepTokens,
    WorkFailed,
)
from pdserve.errors import InternalError
from worker_runtime.dispatches import DispatchEvent, DispatchTable
from worker_runtime.load import LoadBoard
from worker_runtime.reports import DispatchReports
from worker_runtime.session import SessionHub
from worker_runtime.work_entrance import WorkEntrance


class EventRouter:
    def __init__(
        self,
        dispatches: DispatchTable,
        reports: DispatchReports,
        load: LoadBoard,
        hub: SessionHub,
        entrance: WorkEntrance,
    ) -> None:
        self._dispatches = dispatches
        self._reports = reports
        self._load = load
        self._hub = hub
        self._entrance = entrance

    def route(self, event: Event) -> None:
        """Events of dispatches that are unknown or ended have no effect: they crossed a Cancel."""
        match event:
            case StepTokens():
                self._reports.step(event)
            case KvReady() | PrefillDone() | Reserved() | ReserveRefused() | WorkFailed():
                self._to_handler(event)
            case Started():
                self._reports.started(event)
                self._to_handler(event)
            case PromptLogprobs():
                self._reports.prompt_logprobs(event)
            case Load():
                self._load.engine_load(event)
                self._entrance.computes(event.prefill_token_us / 1e6)
            case KvStored():
                self._hub.kv_stored(event.block_hashes)
            case KvEvicted():
                self._hub.kv_evicted(event.block_hashes)
            case KvOffered():
                self._entrance.offered(event)
            case PagesOpened():
                self._entrance.opened(event)
            case Freed():
                pass  # blocks are the engine's; its Load tells how many are free
            case EngineReady():
                raise InternalError("The engine said twice that it is ready.")
            case _:
                assert_never(event)

    def _to_handler(self, event: DispatchEvent) -> None:
        record = self._dispatches.get(event.dispatch)
        if record is not None and not record.ended:
            record.handler.engine_event(event)
