"""Owns the life of an engine process: its tie to the io process, the start-up frame, the loop, the exit code."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol

from engine.protocol import Command, EngineReady, EventSink, Load
from pdserve.errors import ConfigInvalid, ModelUnsupported
from service_kit.config import ClusterConfig
from service_kit.logs import configure_logs, get_logger
from service_kit.process import die_with_parent
from service_kit.start_up_objects import set_apart
from worker_runtime.engine_channel import EngineChannel, IoProcessLost
from worker_runtime.engine_loop import run

START_DEADLINE_S = 10.0
EXIT_STOPPED = 0
EXIT_CONFIG = 2  # started again it would refuse again
EXIT_FAILED = 70  # EX_SOFTWARE
EXIT_IO_LOST = 75

log = get_logger(__name__)


class HostedEngine(Protocol):
    """An Engine (`engine.protocol`) with what its process needs to announce it."""

    @property
    def arena_fd(self) -> int: ...

    def ready(self) -> EngineReady: ...

    def handle(self, command: Command) -> None: ...

    def step(self) -> bool: ...

    def load(self) -> Load: ...


def host_engine(link_fd: int, parent_pid: int, open_engine: Callable[[ClusterConfig, EventSink], HostedEngine]) -> int:
    """Runs the engine that `open_engine` makes until it is stopped. Returns the exit code of the process."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the io process decides
    channel = EngineChannel(socket.socket(fileno=link_fd))
    try:
        config = ClusterConfig.model_validate_json(channel.first_frame(START_DEADLINE_S))
        configure_logs(config.log, "engine")
        engine = open_engine(config, channel)
        channel.announce(engine.ready(), engine.arena_fd)
        set_apart()
        log.info("engine_ready")
        run(engine, channel, time.monotonic)
    except IoProcessLost as lost:
        log.warning("engine_without_io_process", reason=str(lost))
        return EXIT_IO_LOST
    except (ConfigInvalid, ModelUnsupported) as refused:
        log.error("engine_refused", reason=refused.reason, message=refused.message)
        return EXIT_CONFIG
    except Exception as error:
        log.exception("engine_failed", error)
        return EXIT_FAILED
    return EXIT_STOPPED
