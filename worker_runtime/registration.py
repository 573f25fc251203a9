"""Owns making the worker known: registers with every controller until that one has opened a session, and again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import grpc

from pdserve.v1 import membership_pb2, membership_pb2_grpc
from service_kit.logs import get_logger
from worker_runtime.session import SessionHub

CALL_DEADLINE_S = 2.0
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
MIN_LEASE_S = 0.1
SESSION_CHECK_S = 5.0

log = get_logger(__name__)


class Registration:
    """Registers with the controller at one address, for ever."""

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        worker: Callable[[], membership_pb2.WorkerInfo],
        hub: SessionHub,
        rng: random.Random,
    ) -> None:
        self._address = address
        self._stub = membership_pb2_grpc.MembershipServiceStub(channel)
        self._worker = worker
        self._hub = hub
        self._rng = rng
        self._controller_id = ""

    async def run(self) -> None:
        delay_s = FIRST_DELAY_S
        while True:
            if self._hub.is_open(self._controller_id):
                await self._hub_changed(SESSION_CHECK_S)
                delay_s = FIRST_DELAY_S
                continue
            lease_s = await self._register()
            if lease_s is not None:
                # The controller now dials this worker. Should that fail, it must be told again before its lease ends.
                await self._hub_changed(min(max(lease_s / 2, MIN_LEASE_S), LONGEST_DELAY_S))
                continue
            await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def _register(self) -> float | None:
        """The lease in seconds; None where the controller did not answer."""
        request = membership_pb2.RegisterWorkerRequest(worker=self._worker())
        try:
            response = await self._stub.RegisterWorker(request, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            log.debug(
                "registration_failed", controller=self._address, status=error.code().name, details=error.details()
            )
            return None
        if response.controller_id != self._controller_id:
            log.info("registered", controller=self._address, controller_id=response.controller_id)
        self._controller_id = response.controller_id
        return response.lease_ms / 1000

    async def _hub_changed(self, deadline_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._hub.changed()
