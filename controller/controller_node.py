"""Owns one controller: composes fleet, generation, operators, gRPC and HTTP. No globals, no signals."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from controller.admission import AdmissionLimits
from controller.blend_gate import BlendGate
from controller.blend_verdicts import VERDICTS_FILE, VerdictFile
from controller.fleet import Fleet, FleetSettings
from controller.grpc_api import InferenceApi, MembershipApi, generate_limits
from controller.grpc_endpoint import GrpcEndpoint
from controller.http_api.app import create_app
from controller.http_server import HttpServer, bind
from controller.kv_api import KvApi
from controller.model_info import load_model_info
from controller.operations import ModelInfo
from controller.operator_desk import Identity, OperatorDesk
from controller.placement.policies import policy_named
from controller.request_metrics import RequestObserver
from controller.service import ControllerService, ServiceSettings
from controller.waiting_room import PlacementSettings
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig
from service_kit.exposure import check_exposure
from service_kit.grpc_server import worker_credentials
from service_kit.logs import get_logger
from service_kit.metrics import Metrics

HTTP_START_S = 20.0
REGISTRATION_LEASE_S = 2.0
STATE_FILE = "controller.json"

log = get_logger(__name__)


class ControllerNode:
    """`open`, then `run` until cancelled or broken, then `close`. `drain` in between lets running requests end."""

    def __init__(self, config: ClusterConfig, keys: ApiKeys, model: ModelInfo, version: str) -> None:
        """Raises ConfigInvalid where a port is taken."""
        clock = time.monotonic
        self._config = config
        self._threads = ThreadPoolExecutor(config.controller.tokenizer_threads, thread_name_prefix="tokenizer-grpc")
        controller_id = f"controller-{secrets.token_hex(8)}"
        self._identity = Identity(controller_id, model.name, version)
        metrics = Metrics(model.name)
        self._grpc = GrpcEndpoint(config, keys)
        fleet_settings = FleetSettings(
            controller_id,
            config.worker.heartbeat_s,
            config.worker.heartbeat_misses,
            stall_s=config.transfer.lease_s,
            credentials=worker_credentials(config.security),
        )
        self._fleet = Fleet(fleet_settings, clock)
        rng = Random(secrets.randbits(64))
        shelf = VerdictFile(config.state_dir / VERDICTS_FILE)
        blends = BlendGate(config.controller.kv_blend, shelf, self._fleet.identities, clock, time.time)
        settings = _service_settings(config, blends)
        self._service = ControllerService(self._fleet, model.tokenizer, settings, RequestObserver(metrics), rng, clock)
        desk = OperatorDesk(self._fleet, self._service, self._identity, blends, config.worker.drain_s, clock)
        app = create_app(self._service, desk, model, config.controller, metrics, keys)
        listener = bind(config.controller.host, config.controller.port)
        self._http = HttpServer(app, listener, config.security, config.controller.client_stall_s)
        self._apis = (
            InferenceApi(
                self._service,
                model.tokenizer,
                generate_limits(model, config.controller),
                blends,
                self._threads,
                config.controller.client_stall_s,
            ),
            MembershipApi(self._fleet, controller_id, REGISTRATION_LEASE_S),
            KvApi(desk.kv, model.tokenizer, self._threads),
        )

    @classmethod
    async def open(cls, config: ClusterConfig, keys: ApiKeys, version: str) -> ControllerNode:
        """Raises ConfigInvalid, ModelUnsupported."""
        check_exposure(config, keys)
        model = await asyncio.to_thread(load_model_info, config.model)
        return cls(config, keys, model, version)

    async def run(self) -> None:
        """Serves until `stop`. Writes `<state_dir>/controller.json` once both ports answer."""
        identity, host = self._identity, self._config.controller.host
        identity.grpc_address = await self._grpc.start(*self._apis)
        identity.api_url = self._http.url(host, tls=self._config.security.tls_cert is not None)
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(self._service.run(), name="controller-tick")
            serving = group.create_task(self._http.serve(), name="controller-http")
            async with asyncio.timeout(HTTP_START_S):
                await self._http.started()
            write_state(self._config.state_dir, identity)
            log.info("controller_ready", api_url=identity.api_url, grpc_address=identity.grpc_address)
            await serving
            ticking.cancel()

    async def drain(self) -> None:
        """No new request is taken; returns when the last one has ended, or at the deadline."""
        log.info("controller_draining", live_requests=self._service.live_requests)
        await self._grpc.serving(False)
        await self._service.drain(self._config.worker.drain_s)

    def stop(self) -> None:
        self._http.stop()

    async def close(self) -> None:
        await self._grpc.close()
        await self._fleet.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def write_state(state_dir: Path, identity: Identity) -> None:
    """Whole or not at all: others read it at any time."""
    state_dir.mkdir(parents=True, exist_ok=True)
    content = {"api_url": identity.api_url, "grpc_address": identity.grpc_address, "pid": os.getpid()}
    draft = state_dir / f".{STATE_FILE}.{os.getpid()}"
    draft.write_text(json.dumps(content))
    draft.replace(state_dir / STATE_FILE)


def _service_settings(config: ClusterConfig, blends: BlendGate) -> ServiceSettings:
    limits = config.controller
    transport = config.transfer.transport
    return ServiceSettings(
        AdmissionLimits(limits.queue_limit, limits.queue_timeout_s, limits.no_worker_grace_s),
        PlacementSettings(limits.placement, policy_named(limits.placement), "" if transport == "auto" else transport),
        blends,
        request_timeout_s=limits.request_timeout_s,
        max_attempts=limits.max_attempts,
        timelines_kept=limits.decisions_kept,
        key_prefix=secrets.randbits(32),
    )
