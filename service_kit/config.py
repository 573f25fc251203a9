"""Owns the configuration tree of a cluster: one pydantic model, one YAML file, `--set a.b=c`. Validators reject, never repair.

Secrets come from the environment only: PDSERVE_API_KEYS (comma-separated). docs/config.md is generated from this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TransportName = Literal["auto", "ucx", "nixl", "tcp", "inproc"]
RoleName = Literal["prefill", "decode"]
BlendSetting = Literal["off", "verified", "on"]
_CORES = r"^(auto|none|\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)$"


def _switch(value: object) -> object:
    """YAML reads a bare on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class ModelConfig(Section):
    path: str = Field(default="models/pdserve-tiny", description="Directory of a Hugging Face checkpoint, or a hub id.")
    served_name: str = Field(default="", description="Name that clients use; empty = last part of the path.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute and KV dtype. auto = float32 on CPU, bfloat16 on CUDA."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto = cuda where there is one.")
    max_context_tokens: int = Field(default=0, ge=0, description="Context limit; 0 = the model's own.")


class EngineConfig(Section):
    block_tokens: int = Field(default=16, ge=16, le=256, multiple_of=16, description="Tokens of a KV block (page).")
    kv_bytes: int = Field(
        default=0,
        ge=0,
        description="Size of the KV pool of one worker, in bytes; 0 = from free memory: on CUDA all but the reserve, "
        "on the CPU 256 MiB where that much is free beyond it.",
    )
    memory_reserve: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of a device's memory that a pool sized from free memory leaves alone.",
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float8_e4m3"] = Field(
        default="auto",
        description="Type of the KV pool; auto = that of the weights. float8_e4m3 has no scale and saturates at 448. Mean KL "
        "of the next token against a float32 pool, shipped model, held-out text (`python -m benchmarks.approximations`): "
        "bfloat16 3e-5 nats, float8_e4m3 8e-3 nats.",
    )
    token_budget: int = Field(default=2048, ge=16, description="Tokens per step, decodes first, then prefill chunks.")
    prefill_chunk: int = Field(default=512, ge=0, description="Largest chunk of one prompt per step; 0 = unchunked.")
    max_running: int = Field(default=256, ge=1, description="Sequences decoding at once in one worker.")
    decode_headroom: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the pool kept back from reservations for running sequences' growth.",
    )
    prefix_reuse: bool = Field(default=True, description="Reuse KV of equal prefixes inside a worker.")
    threads: int = Field(default=0, ge=0, description="Compute threads of one worker; 0 = cores divided by workers.")
    cores: str = Field(
        default="auto",
        pattern=_CORES,
        description="Cores that the engines' threads are bound to, one thread per core: `auto`, `none` or a list such as `0-3,6`. "
        "`pdserve up` gives each worker cores of its own: of the list, or with `auto` of all allowed cores that no other cluster "
        "has bound; where those are too few, or an engine has one thread, `auto` binds none and the supervisor's log says so. "
        "A worker started by hand binds to its list alone.",
    )
    kernels: Literal["auto", "avx512_bf16", "avx512", "avx2", "torch"] = Field(
        default="auto",
        description="auto = on the CPU the C++ kernels where they are built, of the best instruction set that the machine has "
        "(avx512_bf16, which rounds activations, for bfloat16 models alone), on CUDA torch's varlen attention where a trial at "
        "start gives the right answers; else torch's operators. A named set is for the CPU alone. Workers with and without "
        "AVX512-BF16 compute the same bits if all are given avx512; where some have AVX2 alone, set ATEN_CPU_CAPABILITY=avx2 in "
        "the environment of all instead, which torch's own operators follow too.",
    )
    cuda_graphs: bool = Field(
        default=True, description="On CUDA: replay what lies between attention from graphs in steps that only decode."
    )
    prefill_stream: Literal["shared", "own"] = Field(
        default="shared",
        description="CUDA only: own = prompts are computed on a stream of their own beside the decodes, of lower priority, at "
        "most one batch of them at a time; shared = in one batch with the decodes. own has never run on a GPU so far.",
    )
    shared_prefix_attention: bool = Field(
        default=True, description="Read a prefix that running sequences share once for all of them (Hydragen)."
    )


class TransferConfig(Section):
    transport: TransportName = Field(
        default="auto", description="auto = ucx where ucxx imports, else tcp; tcp with profile tcp; never nixl."
    )
    profile: Literal["host", "tcp", "rdma"] = Field(
        default="host", description="UCX settings: same host, TCP between hosts, or left to UCX (RDMA)."
    )
    lease_s: float = Field(default=10.0, gt=0, description="KV leases, renewed by their holder.")
    heartbeat_s: float = Field(default=0.5, gt=0, description="Heartbeats on the hand-off's control session.")
    heartbeat_misses: int = Field(default=3, ge=1, description="Missed heartbeats after which a peer counts as dead.")
    max_message_bytes: int = Field(default=4 * 2**20, ge=4096, description="Largest KV message.")
    max_in_flight: int = Field(default=16, ge=1, le=256, description="KV messages in flight per peer.")
    connect_s: float = Field(default=5.0, gt=0, description="Deadline to connect to a peer.")


class StoreConfig(Section):
    host_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="Host RAM tier of one worker, in bytes; 0 = no tiers below the device at all.",
    )
    disk_bytes: int = Field(default=2**30, ge=0, description="Disk tier of one worker, in bytes; 0 = none.")
    disk_dir: Path | None = Field(
        default=None, description="Directory of the disk tier; default: kv/ID in the state directory."
    )
    redis_url: str = Field(
        default="",
        description="Redis tier shared by all workers: redis://HOST:PORT/DB or rediss://...; empty = none. "
        "A password belongs in PDSERVE_REDIS_PASSWORD.",
    )
    eviction: Literal["lru", "s3-fifo", "gdsf"] = Field(
        default="lru", description="Which pages leave the host and the disk tier first."
    )
    ttl_s: float = Field(default=86_400.0, gt=0, description="How long a page is kept at most.")
    tenant_bytes: int = Field(
        default=0, ge=0, description="Bytes of one tenant (cache_salt) in each tier; 0 = no quota."
    )
    load_deadline_s: float = Field(
        default=2.0, gt=0, description="Longest wait for pages before a prompt is computed instead."
    )
    offered_share: float = Field(
        default=0.25, gt=0, le=1, description="Share of the device pool that may wait to be copied to the host tier."
    )


class ControllerConfig(Section):
    host: str = Field(default="127.0.0.1", description="Address of the HTTP API.")
    port: int = Field(default=8000, ge=0, le=65535, description="HTTP port; 0 = a free one.")
    grpc_port: int = Field(default=0, ge=0, le=65535, description="gRPC port; 0 = a free one.")
    queue_limit: int = Field(default=1024, ge=0, description="Requests waiting for a worker; more are answered 429.")
    queue_timeout_s: float = Field(default=60.0, gt=0, description="Longest wait in the queue, then 504.")
    no_worker_grace_s: float = Field(
        default=30.0,
        ge=0,
        description="Wait for a worker to come back before 503: longer than a restart with its back-off. The deadline of a "
        "request ends it earlier.",
    )
    request_timeout_s: float = Field(default=600.0, gt=0, description="Deadline of a whole request.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Larger bodies get 413 before parsing.")
    max_choices: int = Field(default=16, ge=1, description="Largest n, and largest number of prompts in a list.")
    placement: str = Field(default="least-loaded", description="Placement policy, by registered name.")
    max_attempts: int = Field(default=5, ge=1, description="Dispatches of one request before it fails.")
    decisions_kept: int = Field(default=1000, ge=1, description="Routing decisions and timelines kept for explain.")
    client_stall_s: float = Field(
        default=60.0,
        gt=0,
        description="Cut a client that takes nothing of its answer for so long; its request is cancelled.",
    )
    sse_keepalive_s: float = Field(default=10.0, gt=0, description="SSE comment while no token comes.")
    tokenizer_threads: int = Field(default=2, ge=1, description="Threads that tokenise prompts.")
    kv_blend: Annotated[BlendSetting, BeforeValidator(_switch)] = Field(
        default="off",
        description="Let requests ask that KV of their chunks be blended, which is approximate. verified = once "
        "`pdserve verify --blend` has passed for the model served; on = for any model.",
    )


class WorkerConfig(Section):
    host: str = Field(
        default="127.0.0.1", description="Address that a worker's gRPC and KV endpoints bind and announce."
    )
    heartbeat_s: float = Field(default=0.5, gt=0, description="Membership heartbeat.")
    heartbeat_misses: int = Field(default=3, ge=1, description="Missed heartbeats after which a worker counts as dead.")
    orphan_s: float = Field(default=30.0, gt=0, description="How long a request lives on without its controller.")
    orphan_buffer_bytes: int = Field(default=64 * 2**20, ge=2**16, description="Bound of one session's replay buffer.")
    drain_s: float = Field(default=30.0, gt=0, description="Longest drain.")
    engine_start_s: float = Field(default=120.0, gt=0, description="Deadline of an engine process's start.")


class PoolConfig(Section):
    prefill: int = Field(default=1, ge=0, le=512, description="Workers with the prefill role.")
    decode: int = Field(default=1, ge=0, le=512, description="Workers with the decode role.")
    both: int = Field(default=0, ge=0, le=512, description="Workers with both roles.")
    restart_backoff_s: float = Field(default=0.5, gt=0, description="First delay before a dead process is restarted.")
    restart_backoff_max_s: float = Field(default=10.0, gt=0, description="Largest delay; doubled at each early death.")
    service_cores: str = Field(
        default="auto",
        pattern=_CORES,
        description="Cores of the controller and of the workers' io processes: `auto`, `none` (any) or a list. With `auto` "
        "`pdserve up` keeps them off the cores that engines are bound to, where as many others are left as there are "
        "workers. A process started by hand keeps to its list alone.",
    )


class SecurityConfig(Section):
    insecure: bool = Field(default=False, description="Allow other addresses than loopback without key and TLS.")
    tls_cert: Path | None = Field(default=None, description="PEM certificate chain.")
    tls_key: Path | None = Field(default=None, description="PEM private key.")
    tls_ca: Path | None = Field(default=None, description="PEM CA of the other processes (mutual TLS).")


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level written.")
    format: Literal["json", "text"] = Field(default="json", description="One line per event on stderr, in this form.")


class ClusterConfig(Section):
    """The whole tree. Every process reads it once, in its `__main__`."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    store: StoreConfig = StoreConfig()
    controller: ControllerConfig = ControllerConfig()
    worker: WorkerConfig = WorkerConfig()
    pool: PoolConfig = PoolConfig()
    security: SecurityConfig = SecurityConfig()
    log: LogConfig = LogConfig()
    controllers: tuple[str, ...] = Field(
        default=(), description="gRPC addresses of the controllers that workers register with."
    )
    state_dir: Path = Field(default=Path(".pdserve"), description="Logs, pid files and cluster.json.")
