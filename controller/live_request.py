"""Owns one request from arrival to end: its choices' states and outputs, and its readers. Does no I/O.

Events are folded here as they arrive, whoever reads: a slow reader holds up nobody, finds more to take the next time, and what
waits for it is bounded by max_tokens. What the events call for is left in `wants`, for the dispatcher to carry out.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from controller.blend_ratio import RatioChoice
from controller.choice_output import ChoiceOutput, Vocabulary
from controller.kv_blend import keys_of
from controller.lifecycle import (
    FINAL,
    Accept,
    CancelAttempt,
    Cancelled,
    ChoiceState,
    Event,
    Fail,
    Fatal,
    Requeue,
    StopMatched,
    Token,
    step,
)
from controller.operations import RequestState
from controller.request import Begun, Delta, GenerationRequest, Logprobs
from controller.timeline import Timeline
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chain_hashes, namespace_root
from pdserve.errors import PdserveError
from service_kit.metrics import MigrationKind

if TYPE_CHECKING:
    from controller.dispatch import Dispatch


@dataclass(slots=True)
class Wants:
    """What must be done outside, since the last look."""

    cancel: list[tuple[int, int]] = field(default_factory=list)  # (attempt, choice)
    requeue: list[int] = field(default_factory=list)  # choices
    entered: list[tuple[int, int, RequestState]] = field(default_factory=list)  # (attempt, choice, new phase)

    def __bool__(self) -> bool:
        return bool(self.cancel or self.requeue or self.entered)


class LiveRequest:
    def __init__(
        self, key: int, request: GenerationRequest, vocabulary: Vocabulary, timeline: Timeline, max_attempts: int
    ) -> None:
        self.key = key
        self.request = request
        self.kv_blend = request.kv_blend  # its ratio is chosen before the first dispatch, and stays
        self.blended_on = b""  # identity of the model that its last order was for, if that was to blend
        self.timeline = timeline
        self.states = [ChoiceState(max_attempts) for _ in range(request.n)]
        self.outputs = [ChoiceOutput(request, vocabulary) for _ in range(request.n)]
        self.dispatches: dict[int, Dispatch] = {}
        self.bad_pairs: set[tuple[str, str]] = set()
        self.begun: Begun | None = None
        self.error: PdserveError | None = None
        self.wants = Wants()
        self.touched = False  # has news in the batch that is being folded
        self.readers: list[Reader] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.migration: MigrationKind | None = None  # the loss that the next token ends
        self._cached_tokens: int | None = None
        self._blended_tokens = 0
        self._prompt_logprobs: tuple[Logprobs, ...] | None = None
        self._last_attempt = 0
        self._hashes: tuple[bytes, bytes] = (b"", b"")  # identity, keys of the prompt's units
        self._chunk_keys: tuple[bytes, list[bytes]] = (b"", [])  # identity, keys of each chunk
        self._open = request.n
        timeline.refresh = self.refresh_timeline

    # ---- events

    def apply(self, choice: int, event: Event, now: float) -> None:
        before = self.states[choice]
        after, commands = step(before, event, now)
        self.states[choice] = after
        if after.phase != before.phase:
            self._entered(choice, after)
        for command in commands:
            match command:
                case Accept(token=token):
                    if self._accept(choice, token, now):
                        return
                case CancelAttempt(attempt=attempt):
                    self.wants.cancel.append((attempt, choice))
                case Requeue():
                    self.wants.requeue.append(choice)
                case Fail(error=error):
                    self.error = self.error or error
                    self._fail_others(self.error, now)
                case _:
                    assert_never(command)

    def _accept(self, choice: int, token: Token, now: float) -> bool:
        """True if a stop string ended the choice: the commands that follow do not count any more."""
        output = self.outputs[choice]
        output.last_token_s = now
        if self.begun is None:
            self._begin_at_token()
        stopped = output.accept(token)
        if stopped:
            self.apply(choice, StopMatched(), now)
        return stopped

    def _entered(self, choice: int, after: ChoiceState) -> None:
        self.wants.entered.append((after.attempt, choice, after.phase))
        if after.phase in FINAL:
            self._open -= 1
            if after.phase == "CANCELLED":
                self.outputs[choice].end("cancelled")

    def fail(self, error: PdserveError, now: float) -> None:
        """The whole request, with all its choices."""
        if not self.done:
            self._fail_others(error, now)

    def _fail_others(self, error: PdserveError, now: float) -> None:
        for choice, state in enumerate(self.states):
            if state.phase not in FINAL:
                self.apply(choice, Fatal(error), now)

    def cancel(self, now: float) -> None:
        for choice in range(self.request.n):
            self.apply(choice, Cancelled(), now)

    def started(self, cached_tokens: int, blended_tokens: int) -> None:
        if self._cached_tokens is None:
            self._cached_tokens = self.timeline.cached_tokens = cached_tokens
            self._blended_tokens = self.timeline.blended_tokens = blended_tokens
        self._begin_if_complete()

    def prompt_logprobs(self, rows: tuple[Logprobs, ...]) -> None:
        if self._prompt_logprobs is None:
            self._prompt_logprobs = rows
        self._begin_if_complete()

    def _begin_if_complete(self) -> None:
        wanted = self.request.sampling.prompt_logprobs is not None
        if self.begun is None and self._cached_tokens is not None and (self._prompt_logprobs is not None or not wanted):
            self.begun = Begun(self._cached_tokens, self._prompt_logprobs or (), self._blended_tokens)

    def _begin_at_token(self) -> None:
        self.begun = Begun(self._cached_tokens or 0, self._prompt_logprobs or ())

    def take_migration(self) -> MigrationKind:
        kind, self.migration = self.migration, None
        assert kind is not None
        return kind

    def choose_ratio(self, choice: RatioChoice) -> None:
        """Once: every attempt must compute the same tokens."""
        assert self.kv_blend is not None
        assert self.kv_blend.undecided
        self.kv_blend = self.kv_blend.with_ratio(choice.ratio) if choice.ratio is not None else None
        self.timeline.ratio_choice = choice

    # ---- what a dispatch needs

    def next_attempt(self) -> int:
        self._last_attempt += 1
        return self._last_attempt

    @property
    def lacks_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None and self._prompt_logprobs is None

    def token_ids(self, choice: int) -> bytes:
        """Prompt and accepted output of one choice: int32, little-endian."""
        accepted = self.outputs[choice].token_ids
        return self.request.token_ids + array("i", accepted).tobytes() if accepted else self.request.token_ids

    def block_hashes(self, identity: bytes, token_ids: bytes) -> bytes:
        """Keys of all full units of `token_ids`, which begins with the prompt; the prompt's own are computed once. None where KV
        is blended: what is approximate is neither looked up nor stored as exact."""
        if self.kv_blend is not None:
            return b""
        root = namespace_root(identity, self.request.cache_salt)
        if self._hashes[0] != identity:
            self._hashes = (identity, chain_hashes(root, self.request.token_ids))
        keys = self._hashes[1]
        covered = len(keys) // HASH_BYTES * HASH_UNIT_TOKENS * TOKEN_BYTES
        if len(token_ids) - covered < HASH_UNIT_TOKENS * TOKEN_BYTES:
            return keys
        return keys + chain_hashes(keys[-HASH_BYTES:] or root, token_ids[covered:])

    def chunk_keys(self, identity: bytes) -> list[bytes]:
        """Keys of the units of each chunk of a prompt that is blended; computed once."""
        assert self.kv_blend is not None
        if self._chunk_keys[0] != identity:
            request = self.request
            keys = keys_of(self.kv_blend.chunks, request.token_ids, identity, request.cache_salt)
            self._chunk_keys = identity, keys
        return self._chunk_keys[1]

    def groups(self, choices: Iterable[int]) -> list[tuple[int, ...]]:
        """`choices` with equal accepted tokens together: they can share one dispatch."""
        found: dict[tuple[int, ...], list[int]] = {}
        for choice in choices:
            found.setdefault(tuple(self.outputs[choice].token_ids), []).append(choice)
        return [tuple(group) for group in found.values()]

    # ---- the end, and readers

    @property
    def deaths(self) -> int:
        """Of workers, at which its prompt was suspected."""
        return max(state.prefill_deaths for state in self.states)

    def prefills(self, choices: Iterable[int]) -> bool:
        """Whether the prompt is still to be computed for one of `choices`."""
        return any(self.states[choice].phase == "PREFILLING" for choice in choices)

    @property
    def done(self) -> bool:
        return self._open == 0

    def wake(self) -> None:
        for reader in self.readers:
            reader.wake()

    def refresh_timeline(self) -> None:
        timeline = self.timeline
        timeline.output_tokens = sum(len(output.token_ids) for output in self.outputs)
        timeline.finish_reasons = tuple(output.finish_reason or "" for output in self.outputs)
        timeline.state = self._overall_state()

    def _overall_state(self) -> RequestState:
        """Of the choice that is furthest behind, while any lives."""
        phases: set[RequestState] = {state.phase for state in self.states}
        order: tuple[RequestState, ...] = (
            "QUEUED", "PREFILLING", "TRANSFERRING", "DECODING", "FAILED", "CANCELLED", "FINISHED",
        )  # fmt: skip
        return next(phase for phase in order if phase in phases)


class Reader:
    """One stream of one client over a request: what it has taken, and what is new for it."""

    __slots__ = ("_began", "_changed", "_left", "_next", "_open", "live")

    def __init__(self, live: LiveRequest, next_index: tuple[int, ...]) -> None:
        self.live = live
        self._next = list(next_index) + [0] * (live.request.n - len(next_index))
        self._open = [True] * live.request.n
        self._left = live.request.n
        self._began = False
        self._changed = asyncio.Event()
        live.readers.append(self)

    def wake(self) -> None:
        self._changed.set()

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    @property
    def ended(self) -> bool:
        return self._left == 0

    def take(self) -> list[Begun | Delta]:
        """What is new. Raises the request's error once everything before it was taken."""
        live = self.live
        items: list[Begun | Delta] = []
        if not self._began:
            begun = live.begun
            if begun is None:
                if live.error is not None:
                    raise live.error
                if not live.done:
                    return items
                begun = Begun(0)
            self._began = True
            items.append(begun)
        for choice, output in enumerate(live.outputs):
            if not self._open[choice]:
                continue
            count, start = len(output.token_ids), self._next[choice]
            ended = output.finish_reason is not None
            if count > start or ended:
                items.append(output.delta(choice, min(start, count)))
                self._next[choice] = max(start, count)
                if ended:
                    self._open[choice] = False
                    self._left -= 1
        if live.error is not None:
            if not items:
                raise live.error
            self._changed.set()  # one wake for the tokens and the error behind them: there is more to take
        return items
