"""Owns the operators' view of the KV tiers: implements `controller.kv_operations.KvOperations` over the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from controller.fleet import Fleet
from controller.kv_holdings import DEVICE_TIER
from controller.kv_operations import (
    KEYS_MOST,
    VERIFY_MOST_S,
    KvExplanation,
    KvOutcome,
    KvPages,
    KvStat,
    OutcomeStatus,
    PageStatus,
    Prompt,
    Selection,
    Silence,
    VerifyBounds,
    WorkerHolding,
)
from controller.kv_status import worker_tiers
from controller.worker_commands import WorkerCommands
from controller.worker_record import WorkerRecord
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chain_hashes, namespace_root
from pdserve.errors import InvalidRequest, NotFound, PdserveError, Unavailable
from pdserve.v1 import worker_pb2

SHARED_TIER = "redis"  # the same pages for every worker: one of them is asked

Command = worker_pb2.KvCommand


@dataclass(frozen=True, slots=True)
class _Order:
    worker_id: str
    tiers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Answered:
    worker_id: str
    answer: worker_pb2.KvAnswer


class KvDesk:
    def __init__(self, fleet: Fleet, commands: WorkerCommands) -> None:
        self._fleet = fleet
        self._commands = commands

    def stat(self) -> KvStat:
        return KvStat(tuple([worker_tiers(record) for record in self._reachable()]))

    async def pages(self, selection: Selection, limit: int) -> KvPages:
        command = Command(action=Command.ACTION_LIST, keys=self._keys(selection), limit=limit)
        answered, silent = await self._ask(self._orders(selection, ()), command)
        found = [
            PageStatus(
                worker=each.worker_id,
                tier=page.tier,
                key=page.key.hex(),
                parent=page.parent.hex(),
                size_bytes=page.bytes,
                age_s=page.age_s,
                refs=page.refs,
                held_s=page.held_s,
            )
            for each in answered
            for page in each.answer.pages
        ]
        return KvPages(tuple(found), silent + _failures(answered))

    async def explain(self, prompt: Prompt) -> KvExplanation:
        keys = self._prompt_keys(prompt)
        records = self._reachable()
        shared, silent = await self._shared_units(records, keys)
        return KvExplanation(
            prompt_tokens=len(prompt.token_ids) // TOKEN_BYTES,
            keyed_tokens=len(keys) // HASH_BYTES * HASH_UNIT_TOKENS,
            workers=tuple([_holding(record, keys, shared) for record in records]),
            silent=silent,
        )

    async def pin(self, selection: Selection, hold_s: float) -> KvOutcome:
        if selection.tier in (DEVICE_TIER, SHARED_TIER):
            raise InvalidRequest(
                f"Nothing can be pinned in the tier {selection.tier}: it evicts by its own rules. Pin in host or disk.",
                param="tier",
            )
        keys = self._keys(selection)
        if not keys:
            raise InvalidRequest("Name the pages to pin: keys, or a prompt.", param="keys")
        orders = [
            _Order(order.worker_id, tuple(tier for tier in order.tiers if tier != SHARED_TIER))
            for order in self._orders(selection, ())
        ]
        command = Command(action=Command.ACTION_PIN, keys=keys, hold_ms=round(hold_s * 1000))
        return await self._steer([order for order in orders if order.tiers], command)

    async def flush(self, selection: Selection) -> KvOutcome:
        keys = self._keys(selection)
        if keys and selection.tier == DEVICE_TIER:
            raise InvalidRequest(
                "The device pool can only be flushed as a whole: leave out keys and prompt.", param="tier"
            )
        orders = self._orders(selection, () if keys else (DEVICE_TIER,))
        return await self._steer(orders, Command(action=Command.ACTION_FLUSH, keys=keys))

    async def verify(self, selection: Selection, bounds: VerifyBounds) -> KvOutcome:
        command = Command(
            action=Command.ACTION_VERIFY,
            keys=self._keys(selection),
            deadline_ms=round(min(bounds.deadline_s, VERIFY_MOST_S) * 1000),
            max_bytes=bounds.max_bytes,
            after=bounds.after,
        )
        return await self._steer(self._orders(selection, ()), command)

    # ---- whom to ask

    def _reachable(self) -> list[WorkerRecord]:
        records = sorted(self._fleet.records(), key=lambda record: record.worker_id)
        return [record for record in records if record.member.state in ("READY", "DRAINING")]

    def _orders(self, selection: Selection, besides: Sequence[str]) -> list[_Order]:
        """Which worker is asked for which tiers. besides: tiers that every worker has and does not report."""
        records = self._reachable()
        if selection.worker_id:
            records = [record for record in records if record.worker_id == selection.worker_id]
            if not records:
                raise NotFound(
                    f"No worker {selection.worker_id[:128]!r} is ready here; `pdserve status` lists them.",
                    param="worker",
                )
        if not records:
            raise Unavailable("No worker is ready.", retry_after_s=1.0)
        orders: list[_Order] = []
        shared_asked = False
        for record in records:
            tiers = [*besides, *(report.tier for report in record.load.tiers)]
            chosen = [
                tier for tier in tiers if selection.tier in ("", tier) and not (shared_asked and tier == SHARED_TIER)
            ]
            shared_asked = shared_asked or SHARED_TIER in chosen
            if chosen:
                orders.append(_Order(record.worker_id, tuple(chosen)))
        if not orders and selection.tier:
            raise NotFound(
                f"No worker has a tier {selection.tier[:64]!r} for this; `pdserve kv stat` lists them.", param="tier"
            )
        return orders

    def _keys(self, selection: Selection) -> bytes:
        """Packed; empty only where neither keys nor a prompt were given."""
        keys = b"".join(selection.keys)
        if any(len(key) != HASH_BYTES for key in selection.keys):
            raise InvalidRequest(f"Keys have {HASH_BYTES} bytes, {2 * HASH_BYTES} hexadecimal digits.", param="keys")
        if selection.prompt is not None:
            of_prompt = self._prompt_keys(selection.prompt)
            if not of_prompt:
                raise InvalidRequest(
                    f"This prompt has fewer than {HASH_UNIT_TOKENS} tokens: nothing of it is ever kept.", param="prompt"
                )
            keys += of_prompt
        if len(keys) > KEYS_MOST * HASH_BYTES:
            raise InvalidRequest(f"At most {KEYS_MOST} pages can be named at once.", param="keys")
        return keys

    def _prompt_keys(self, prompt: Prompt) -> bytes:
        identity = self._fleet.identity()
        if not identity:
            raise Unavailable("No worker is ready: what its KV is named by is not known yet.", retry_after_s=1.0)
        return chain_hashes(namespace_root(identity, prompt.cache_salt), prompt.token_ids)

    # ---- asking

    async def _steer(self, orders: Sequence[_Order], command: Command) -> KvOutcome:
        answered, silent = await self._ask(orders, command)
        found = [_outcome(each.worker_id, outcome) for each in answered for outcome in each.answer.outcomes]
        return KvOutcome(tuple(found), silent)

    async def _ask(self, orders: Sequence[_Order], command: Command) -> tuple[list[_Answered], tuple[Silence, ...]]:
        """All at once. Where nobody answers, the first one's error is raised."""
        answers = await asyncio.gather(*(self._ask_one(order, command) for order in orders))
        answered = [each for each in answers if isinstance(each, _Answered)]
        errors = [(order, each) for order, each in zip(orders, answers, strict=True) if isinstance(each, PdserveError)]
        if errors and not answered:
            raise errors[0][1]
        return answered, tuple([Silence(order.worker_id, error.reason, error.message) for order, error in errors])

    async def _ask_one(self, order: _Order, command: Command) -> _Answered | PdserveError:
        own = Command()
        own.CopyFrom(command)
        own.tiers.extend(order.tiers)
        try:
            return _Answered(order.worker_id, await self._commands.inspect(order.worker_id, own))
        except PdserveError as error:
            return error

    async def _shared_units(
        self, records: Sequence[WorkerRecord], keys: bytes
    ) -> tuple[frozenset[bytes], tuple[Silence, ...]]:
        """Unit keys that lie in the shared tier, which tells no events: one worker looks."""
        record = next((each for each in records if _has_shared(each)), None)
        if record is None or not keys:
            return frozenset(), ()
        command = Command(action=Command.ACTION_LIST, keys=keys[: KEYS_MOST * HASH_BYTES], limit=KEYS_MOST)
        answer = await self._ask_one(_Order(record.worker_id, (SHARED_TIER,)), command)
        if isinstance(answer, PdserveError):
            return frozenset(), (Silence(record.worker_id, answer.reason, answer.message),)
        silent = _failures([answer])
        pages = {page.key for page in answer.answer.pages}
        per_page = max(1, record.info.capabilities.block_tokens // HASH_UNIT_TOKENS)
        units = [keys[at : at + HASH_BYTES] for at in range(0, len(keys), HASH_BYTES)]
        covered = [units[at + 1 - per_page : at + 1] for at, unit in enumerate(units) if unit in pages]
        return frozenset(unit for some in covered for unit in some), silent


def _failures(answered: Sequence[_Answered]) -> tuple[Silence, ...]:
    """Tiers that could not be looked at."""
    return tuple(
        [
            Silence(each.worker_id, "tier_failed", f"{outcome.tier}: {outcome.failure}")
            for each in answered
            for outcome in each.answer.outcomes
            if outcome.failure
        ]
    )


def _has_shared(record: WorkerRecord) -> bool:
    return any(report.tier == SHARED_TIER for report in record.load.tiers)


def _holding(record: WorkerRecord, keys: bytes, shared: frozenset[bytes]) -> WorkerHolding:
    tokens = {DEVICE_TIER: 0, **{report.tier: 0 for report in record.load.tiers}}
    reusable, gap = 0, False
    shares = _has_shared(record)
    for at, tiers in enumerate(record.holdings.tiers_of_units(keys)):
        in_shared = shares and keys[at * HASH_BYTES : (at + 1) * HASH_BYTES] in shared
        for tier in tiers | {SHARED_TIER} if in_shared else tiers:
            tokens[tier] = tokens.get(tier, 0) + HASH_UNIT_TOKENS
        gap = gap or not (tiers or in_shared)
        reusable += 0 if gap else HASH_UNIT_TOKENS
    return WorkerHolding(record.worker_id, tokens, reusable)


def _outcome(worker_id: str, outcome: worker_pb2.TierOutcome) -> OutcomeStatus:
    bad = outcome.bad_keys
    return OutcomeStatus(
        worker=worker_id,
        tier=outcome.tier,
        pages=outcome.pages,
        bad=outcome.bad,
        checked_bytes=outcome.bytes,
        cut=outcome.cut,
        last_key=outcome.last_key.hex(),
        bad_keys=tuple([bad[at : at + HASH_BYTES].hex() for at in range(0, len(bad), HASH_BYTES)]),
        failure=outcome.failure,
    )
