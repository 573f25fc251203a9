"""Owns the metrics: one Prometheus registry per process, our families and their vLLM aliases, typed calls to observe.

A family with an alias is observed once and exposed under both names. Labels are bounded: no ids, prompts or keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pdserve.errors import ERRORS_BY_REASON

disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
ITL_BUCKETS = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
REQUEST_BUCKETS = (.01, .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)  # fmt: skip
STAGE_BUCKETS = (.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30)  # fmt: skip
LAG_BUCKETS = (.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 5)  # fmt: skip

FinishedReason = Literal["stop", "length", "cancelled", "error"]
Stage = Literal["queue", "reserve", "prefill", "transfer", "decode"]
MigrationKind = Literal["prefill_lost", "decode_lost", "handoff_failed"]
MigrationOutcome = Literal["resumed", "failed"]
TransferFailure = Literal["connection", "checksum", "refused", "timeout"]
TierLevel = Literal["used_bytes", "capacity_bytes", "pages"]
TierCount = Literal[
    "hit_tokens", "miss_tokens", "bytes_in", "bytes_out", "read_seconds", "read_pages", "write_seconds", "stored_pages",
    "evicted_pages", "evicted_age_seconds", "expired_pages", "dropped_pages", "failures", "loaded_tokens",
]  # fmt: skip
LoadCount = Literal[
    "queried_tokens", "seconds", "late", "no_room", "not_worth_it", "offers_skipped", "dropped_on_the_way_down", "lent_tokens"
]  # fmt: skip
PeerFailure = Literal["pull", "loan"]

_TIERS = ("device", "host", "disk", "redis", "peer")
_TIER_VERIFY_KINDS = ("checksum", "header", "length", "identity", "fingerprint")

Family: TypeAlias = Counter | Gauge | Histogram
F = TypeVar("F", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds of one finished request, and the tokens they were spent on."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Sums over all live workers."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_leaked: int
    ready_workers: Mapping[Literal["prefill", "decode"], int]


@dataclass(frozen=True, slots=True)
class FamilyNote:
    """What is said of a family in the docs. Names as in queries; a histogram's also end in _bucket, _sum and _count."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str
    alias: str  # vLLM's name; empty = none


class _Families:
    """Makes families in one registry; keeps which of them have an alias, and what the docs say of each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.aliases: list[tuple[Family, str, str]] = []
        self.notes: list[FamilyNote] = []

    def counter(self, name: str, text: str, labels: Sequence[str] = (), alias: str = "") -> Counter:
        total = f"vllm:{alias}_total" if alias else ""
        self.notes.append(FamilyNote(f"pdserve_{name}_total", "counter", tuple(labels), text, total))
        return self._aliased(Counter(f"pdserve_{name}", text, labels, registry=self._registry), name, alias)

    def gauge(self, name: str, text: str, labels: Sequence[str] = (), alias: str = "") -> Gauge:
        theirs = f"vllm:{alias}" if alias else ""
        self.notes.append(FamilyNote(f"pdserve_{name}", "gauge", tuple(labels), text, theirs))
        return self._aliased(Gauge(f"pdserve_{name}", text, labels, registry=self._registry), name, alias)

    def histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: Sequence[str] = (), alias: str = ""
    ) -> Histogram:
        theirs = f"vllm:{alias}" if alias else ""
        self.notes.append(FamilyNote(f"pdserve_{name}", "histogram", tuple(labels), text, theirs))
        made = Histogram(f"pdserve_{name}", text, labels, registry=self._registry, buckets=buckets)
        return self._aliased(made, name, alias)

    def _aliased(self, family: F, name: str, alias: str) -> F:
        if alias:
            self.aliases.append((family, f"pdserve_{name}", f"vllm:{alias}"))
        return family


class _AliasCollector(Collector):
    """Gives the families with an alias a second time, under the vLLM name and with vLLM's label model_name."""

    def __init__(self, aliases: Iterable[tuple[Family, str, str]], model_name: str) -> None:
        self._aliases = tuple(aliases)
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        for family, name, alias in self._aliases:
            for ours in family.collect():
                theirs = Metric(alias, ours.documentation, ours.type)
                for sample in ours.samples:
                    labels = {"model_name": self._model_name, **sample.labels}
                    theirs.add_sample(alias + sample.name.removeprefix(name), labels, sample.value)
                yield theirs


class RequestMetrics:
    """What clients see."""

    def __init__(self, make: _Families) -> None:
        self._prompt = make.counter("prompt_tokens", "Prompt tokens of accepted requests.", alias="prompt_tokens")
        self._generated = make.counter("generation_tokens", "Tokens sent to clients.", alias="generation_tokens")
        self._finished = make.counter(
            "request_success", "Finished requests.", ["finished_reason"], alias="request_success"
        )
        self._rejected = make.counter("rejections", "Requests refused, by error reason.", ["reason"])
        self._ttft = make.histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS, alias="time_to_first_token_seconds"
        )
        self._itl = make.histogram(
            "inter_token_latency_seconds", "Gap between tokens.", ITL_BUCKETS, alias="inter_token_latency_seconds"
        )
        self._tpot = make.histogram(
            "request_time_per_output_token_seconds", "Mean gap between tokens of one request.", ITL_BUCKETS,
            alias="request_time_per_output_token_seconds",
        )  # fmt: skip
        self._e2e = make.histogram(
            "e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS, alias="e2e_request_latency_seconds"
        )
        self._queue, self._prefill, self._decode = (
            make.histogram(f"request_{part}_time_seconds", text, REQUEST_BUCKETS, alias=f"request_{part}_time_seconds")
            for part, text in (
                ("queue", "Waiting for a worker."), ("prefill", "Dispatch to first token."), ("decode", "First token to end."),
            )
        )  # fmt: skip
        self._stage = make.histogram("stage_seconds", "Parts of a request.", STAGE_BUCKETS, ["stage"])

    def accepted(self, prompt_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)

    def rejected(self, reason: str) -> None:
        """`reason`: of pdserve.errors; others count as "other"."""
        self._rejected.labels(reason if reason in ERRORS_BY_REASON else "other").inc()

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def tokens(self, count: int) -> None:
        self._generated.inc(count)

    def token_gap(self, itl_s: float) -> None:
        self._itl.observe(itl_s)

    def finished(self, reason: FinishedReason, times: RequestTimes) -> None:
        self._finished.labels(reason).inc()
        self._queue.observe(times.queue_s)
        self._prefill.observe(times.prefill_s)
        self._decode.observe(times.decode_s)
        self._e2e.observe(times.total_s)
        if times.output_tokens > 1:
            self._tpot.observe(times.decode_s / (times.output_tokens - 1))

    def stage(self, stage: Stage, seconds: float) -> None:
        self._stage.labels(stage).observe(seconds)


class TransferMetrics:
    """Hand-offs of KV between workers."""

    def __init__(self, make: _Families) -> None:
        self._bytes = make.counter("kv_transfer_bytes", "KV bytes handed over.", ["transport"])
        self._seconds = make.histogram(
            "kv_transfer_seconds", "First byte to last byte of a hand-off.", STAGE_BUCKETS, ["transport"]
        )
        self._exposed = make.histogram(
            "kv_transfer_exposed_seconds", "End of prefill to activation.", STAGE_BUCKETS, ["transport"]
        )
        self._failures = make.counter("kv_transfer_failures", "Hand-offs that failed.", ["kind"])
        self._expired = make.counter("kv_transfer_expired", "Leases on blocks that a peer may write to, expired.")
        self._verify = make.counter("kv_verify_failures", "KV messages that were not what was announced.")

    def handed_over(self, transport: str, byte_count: int, transfer_s: float, exposed_s: float) -> None:
        label = transport if transport in ("ucx", "nixl", "tcp", "inproc") else "other"
        self._bytes.labels(label).inc(byte_count)
        self._seconds.labels(label).observe(transfer_s)
        self._exposed.labels(label).observe(exposed_s)

    def failed(self, kind: TransferFailure) -> None:
        self._failures.labels(kind).inc()

    def expired(self, growth: float) -> None:
        self._expired.inc(growth)

    def verify_failed(self, growth: float) -> None:
        self._verify.inc(growth)


class RoutingMetrics:
    """Placement and what became of it."""

    def __init__(self, make: _Families) -> None:
        self._decisions = make.counter("routing_decisions", "Placement decisions.", ["policy", "reason"])
        self._migrations = make.counter("migrations", "Requests moved to another worker.", ["kind", "outcome"])

    def decided(self, policy: str, reason: str) -> None:
        """Both from the code's own bounded sets of names, never from a client."""
        self._decisions.labels(policy, reason).inc()

    def migrated(self, kind: MigrationKind, outcome: MigrationOutcome) -> None:
        self._migrations.labels(kind, outcome).inc()


class FleetMetrics:
    """Load of all workers together."""

    def __init__(self, make: _Families) -> None:
        self._running = make.gauge("requests_running", "Sequences in batches.", alias="num_requests_running")
        self._waiting = make.gauge("requests_waiting", "Requests waiting.", alias="num_requests_waiting")
        self._usage = make.gauge("kv_cache_usage_ratio", "Blocks in use, 0 to 1.", alias="kv_cache_usage_perc")
        self._leaked = make.gauge("leaked_blocks", "Blocks that nobody owns; always 0.")
        self._ready = make.gauge("ready_workers", "Workers that take work.", ["role"])
        self._cache = make.gauge(
            "cache_config_info", "KV pool; the value is 1.", ["block_size", "num_gpu_blocks"], alias="cache_config_info"
        )
        self._queries = make.counter("prefix_cache_queries", "Prompt tokens looked up.", alias="prefix_cache_queries")
        self._hits = make.counter("prefix_cache_hits", "Prompt tokens found.", alias="prefix_cache_hits")
        self._blended = make.counter("kv_blended_tokens", "Tokens of chunks whose KV was blended into prompts.")

    def load(self, load: FleetLoad) -> None:
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        used = load.blocks_total - load.blocks_free
        self._usage.set(used / load.blocks_total if load.blocks_total else 0.0)
        self._leaked.set(load.blocks_leaked)
        for role, count in load.ready_workers.items():
            self._ready.labels(role).set(count)

    def cache_config(self, block_tokens: int, blocks_total: int) -> None:
        self._cache.clear()
        self._cache.labels(str(block_tokens), str(blocks_total)).set(1)

    def prefix_lookups(self, query_tokens: float, hit_tokens: float) -> None:
        """Growth since the last call, over all workers."""
        self._queries.inc(query_tokens)
        self._hits.inc(hit_tokens)

    def blended(self, tokens: int) -> None:
        self._blended.inc(tokens)


class TierMetrics:
    """KV tiers below the device, sums over all workers. Redis is shared: its occupancy is that of one look."""

    def __init__(self, make: _Families) -> None:
        self._gauges = {
            name: make.gauge(f"kv_tier_{name}", text, ["tier"])
            for name, text in (
                ("used_bytes", "Bytes in use."),
                ("capacity_bytes", "Bytes there is room for; 0 = without bound of ours."),
                ("pages", "Pages, where they are counted."),
            )
        }
        self._counters = {
            name: make.counter(f"kv_tier_{name}", text, ["tier"])
            for name, text in (
                ("hit_tokens", "Tokens read."),
                ("miss_tokens", "Tokens that were expected and not readable."),
                ("bytes_in", "Payload bytes stored."),
                ("bytes_out", "Payload bytes read."),
                ("read_seconds", "Time of reads; per page with kv_tier_read_pages."),
                ("read_pages", "Pages read."),
                ("write_seconds", "Time of writes; per page with kv_tier_stored_pages."),
                ("stored_pages", "Pages stored."),
                ("evicted_pages", "Pages evicted for others."),
                ("evicted_age_seconds", "Summed age of evicted pages."),
                ("expired_pages", "Pages that outlived store.ttl_s."),
                ("dropped_pages", "Pages not stored: back-pressure, quota, no room, or the medium failed."),
                ("failures", "Calls that the medium failed."),
                ("loaded_tokens", "Prompt tokens loaded from this tier."),
            )
        }
        self._verify = make.counter("kv_tier_verify_failures", "Pages that were not what was stored.", ["tier", "kind"])
        self._loads = {
            name: make.counter(f"kv_load_{name}", text)
            for name, text in (
                ("queried_tokens", "Prompt tokens not on the device, looked for in the tiers."),
                ("seconds", "Time that prompts waited for pages."),
                ("late", "Loads that their deadline ended."),
                ("no_room", "Loads without room on the device."),
                ("not_worth_it", "Loads that computing was expected to beat."),
                ("offers_skipped", "Pages never offered to the tiers: too many waited."),
                ("dropped_on_the_way_down", "Pages that left the host tier before they were stored below it."),
                ("lent_tokens", "Tokens whose KV was lent to a peer."),
            )
        }  # fmt: skip
        self._peers: dict[PeerFailure, Counter] = {
            "pull": make.counter("kv_pull_failures", "Pulls of pages from a peer that brought none.", ["reason"]),
            "loan": make.counter("kv_loan_failures", "Pulls by a peer that were refused or failed.", ["reason"]),
        }

    def level(self, name: TierLevel, tier: str, value: float) -> None:
        self._gauges[name].labels(tier_label(tier)).set(value)

    def grown(self, name: TierCount, tier: str, growth: float) -> None:
        self._counters[name].labels(tier_label(tier)).inc(growth)

    def verify_failed(self, tier: str, kind: str, growth: float) -> None:
        self._verify.labels(tier_label(tier), kind if kind in _TIER_VERIFY_KINDS else "other").inc(growth)

    def loads_grown(self, name: LoadCount, growth: float) -> None:
        self._loads[name].inc(growth)

    def peer_failed(self, kind: PeerFailure, reason: str, growth: float) -> None:
        self._peers[kind].labels(reason if reason in ERRORS_BY_REASON else "other").inc(growth)


def tier_label(name: str) -> str:
    return name if name in _TIERS else "other"


class Metrics:
    """All families of one process. Made once, in `__main__`, and handed down."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        make = _Families(self.registry)
        self.requests = RequestMetrics(make)
        self.transfer = TransferMetrics(make)
        self.routing = RoutingMetrics(make)
        self.fleet = FleetMetrics(make)
        self.tiers = TierMetrics(make)
        self._lag = make.histogram("event_loop_lag_seconds", "How late the event loop runs.", LAG_BUCKETS)
        self.registry.register(_AliasCollector(make.aliases, model_name))
        self.families = tuple(make.notes)

    def event_loop_lag(self, lag_s: float) -> None:
        self._lag.observe(max(lag_s, 0.0))

    def exposition(self) -> bytes:
        """Body of /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)
