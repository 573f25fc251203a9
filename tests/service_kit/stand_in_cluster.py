"""Owns a supervisor over stand-in processes: `python -m tests.service_kit.stand_in_cluster STATE_DIR TABLE_JSON`.

TABLE_JSON: {"name": ["argument of the stand-in", …]}; see stand_in.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from service_kit.cluster_files import ClusterFiles
from service_kit.config import ClusterConfig, ControllerConfig, LogConfig
from service_kit.logs import configure_logs
from service_kit.process import ProcessSpec
from service_kit.restart_policy import RestartPolicy
from service_kit.supervisor import Addresses, Supervisor, supervise

STAND_IN = Path(__file__).with_name("stand_in.py")
POLICY = RestartPolicy(first_delay_s=0.05, longest_delay_s=0.2, healthy_s=5.0)
DRAIN_S = 30.0


async def run(files: ClusterFiles, table: tuple[ProcessSpec, ...]) -> None:
    config = ClusterConfig(controller=ControllerConfig(port=0))
    await supervise(Supervisor(table, POLICY, files, Addresses(config), DRAIN_S))


def main(state_dir: Path, rows: dict[str, list[str]]) -> None:
    configure_logs(LogConfig(), "supervisor")
    table = tuple(ProcessSpec(name, (sys.executable, str(STAND_IN), *arguments)) for name, arguments in rows.items())
    files = ClusterFiles(state_dir)
    files.lock()
    files.begin(ClusterConfig())
    asyncio.run(run(files, table))
    files.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
