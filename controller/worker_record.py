"""Owns what the controller knows of one worker: its last reports, corrected by what was sent since. Not thread-safe."""

from __future__ import annotations

from dataclasses import dataclass

from controller.kv_holdings import KvHoldings
from controller.kv_prices import KvPrices, prices_of
from controller.membership import Member
from controller.operations import KvEndpointStatus, RoleName, WorkerStatus
from controller.placement.snapshot import WorkerView
from controller.worker_session import WorkerSession
from pdserve.v1 import membership_pb2, types_pb2, worker_pb2

STALL_STEPS = 20  # a hung engine is one that makes no step for so many of its usual ones, at least for `patience_s`
_ROLE_NAMES: dict[int, RoleName] = {types_pb2.ROLE_PREFILL: "prefill", types_pb2.ROLE_DECODE: "decode"}


@dataclass(frozen=True, slots=True)
class Burden:
    """What one dispatch means for one worker until it is released."""

    prefill_tokens: int = 0
    sequences: int = 0
    unreported_blocks: int = 0  # asked for, but not yet in a report
    suspects: int = 0  # prompts to be computed there that an earlier worker died with


class WorkerRecord:
    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.member = Member()
        self.info = membership_pb2.WorkerInfo(worker_id=worker_id)
        self.load = worker_pb2.LoadReport()
        self.session: WorkerSession | None = None
        self.holdings = KvHoldings()
        self.dispatches = 0
        self.stalled = False
        self.frame_s = 0.0  # when its last frame came; `member` learns of it at the next tick
        self._step_changed_s = 0.0
        self._prefill_tokens = 0
        self._sequences = 0
        self._unreported_blocks = 0
        self._suspects = 0
        self._view: WorkerView | None = None
        self._prices: tuple[worker_pb2.LoadReport, KvPrices] | None = None  # of that report

    def introduce(self, info: membership_pb2.WorkerInfo) -> None:
        """A new incarnation, or news of this one."""
        self.info = info
        if not self.load.blocks_total:
            self.load = worker_pb2.LoadReport(
                roles=info.roles,
                blocks_total=info.capabilities.blocks_total,
                blocks_free=info.capabilities.blocks_total,
            )
        self._view = None

    def forget_load(self) -> None:
        """The incarnation is gone. Its burdens go one by one, as their dispatches end."""
        self.load = worker_pb2.LoadReport()
        self.holdings = KvHoldings()
        self.stalled = False
        self._view = None

    def report(self, load: worker_pb2.LoadReport, now: float) -> None:
        if load.engine_step != self.load.engine_step or not load.running:
            self._step_changed_s = now
        self.load = load
        self._view = None

    def judge_stall(self, now: float, patience_s: float) -> bool:
        """True when the engine has just been found to hang: sequences run, but no step is made."""
        patience_s = max(patience_s, STALL_STEPS * self.load.step_ms / 1000)
        stalled = bool(self.load.running) and now - self._step_changed_s > patience_s
        found = stalled and not self.stalled
        if stalled != self.stalled:
            self.stalled = stalled
            self._view = None
        return found

    def member_changed(self, member: Member) -> None:
        if member.takes_work != self.member.takes_work or member.state != self.member.state:
            self._view = None
        self.member = member

    def bear(self, burden: Burden) -> None:
        self._add(burden, 1)

    def relieve(self, burden: Burden) -> None:
        self._add(burden, -1)

    def _add(self, burden: Burden, sign: int) -> None:
        self._prefill_tokens += sign * burden.prefill_tokens
        self._sequences += sign * burden.sequences
        self._unreported_blocks += sign * burden.unreported_blocks
        self._suspects += sign * burden.suspects
        self._view = None

    def view(self) -> WorkerView:
        if self._view is None:
            self._view = self._made_view()
        return self._view

    def prices(self) -> KvPrices:
        """By its last report."""
        if self._prices is None or self._prices[0] is not self.load:
            self._prices = self.load, prices_of(self.load, self.view().block_tokens)
        return self._prices[1]

    def _made_view(self) -> WorkerView:
        load, info = self.load, self.info
        roles = self.roles()
        return WorkerView(
            worker_id=self.worker_id,
            ready=self.member.takes_work,
            draining=self.member.state == "DRAINING" or load.draining,
            stalled=self.stalled,
            prefill="prefill" in roles,
            decode="decode" in roles,
            identity=info.identity.digest,
            transports=tuple(endpoint.transport for endpoint in info.kv_endpoints),
            max_context_tokens=info.capabilities.max_context_tokens,
            block_tokens=max(1, info.capabilities.block_tokens),
            blocks_total=max(1, load.blocks_total),
            blocks_free=max(0, load.blocks_free - self._unreported_blocks),
            pending_prefill_tokens=max(load.waiting_tokens, self._prefill_tokens),
            sequences=max(load.running, self._sequences),
            max_batch=max(1, info.capabilities.max_batch),
            token_budget=max(1, info.capabilities.token_budget),
            suspects=self._suspects,
        )

    def roles(self) -> tuple[RoleName, ...]:
        return tuple(_ROLE_NAMES[role] for role in self.load.roles if role in _ROLE_NAMES)

    def status(self, now: float) -> WorkerStatus:
        info, load, member = self.info, self.load, self.member
        return WorkerStatus(
            id=self.worker_id,
            roles=self.roles(),
            state=member.state,
            pid=info.pid,
            engine_pid=info.engine_pid,
            address=info.address,
            version=info.version,
            incarnation=str(info.incarnation),
            kv_endpoints=tuple(KvEndpointStatus(each.transport, each.address) for each in info.kv_endpoints),
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_leaked=load.blocks_leaked,
            reserved_blocks=load.reserved_blocks,
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            dispatches=self.dispatches,
            step_ms=load.step_ms,
            engine_step=load.engine_step,
            stalled=self.stalled,
            prefix_queries=load.prefix_queries,
            prefix_hits=load.prefix_hits,
            preemptions=load.preemptions,
            verify_failures=load.verify_failures,
            expired_leases=load.expired_leases,
            resident_bytes=load.resident_bytes,
            silent_s=max(0.0, now - max(member.heard_s, self.frame_s)),
            lost_reason=member.lost_reason,
            pinned_bytes=load.pinned_bytes,
        )
