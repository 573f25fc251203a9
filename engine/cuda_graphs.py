"""Owns the decoder's pieces between attention: run one by one, or on CUDA replayed from graphs, one set per batch bucket.

A step that only decodes is padded to the next bucket; its inputs are copied into static buffers, the recorded pieces work on
them, and attention, whose arguments change in size, stays outside. The head stays outside too: it is three launches, and its
buffer would be a vocabulary wide. Rotary rows are an input, because their table moves when it grows.
Never run on a GPU so far: tests cover everything but `CudaCapture`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from engine.decoder import Decoder
from engine.step_batch import StepBatch
from service_kit.logs import get_logger

_log = get_logger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Capture(Protocol):
    """Implementations: CudaCapture; for the tests one that runs the piece again."""

    def __call__(self, piece: Callable[[], None]) -> Callable[[], None]:
        """Records what `piece` does to tensors that stay where they are, and returns what does it again. May run `piece`."""


class Pieces(Protocol):
    """One step through the decoder. Contract: tests/engine/test_cuda_graphs.py."""

    def begin(self, batch: StepBatch) -> QueryKeyValue:
        """Query, key and value of layer 0, each [n, heads or kv_heads, dim]."""

    def between(self, layer: int, attended: torch.Tensor) -> QueryKeyValue:
        """From the attention of `layer` [n, heads, dim] to query, key and value of the next layer."""

    def end(self, attended: torch.Tensor) -> torch.Tensor:
        """From the attention of the last layer to the hidden state [n, hidden], valid until the next step."""


class EagerPieces:
    """Implements Pieces, for any batch on any device."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._hidden = torch.empty(0)
        self._rotary = torch.empty(0)

    def begin(self, batch: StepBatch) -> QueryKeyValue:
        self._rotary = self._decoder.rotary(batch.positions, batch.highest_position)
        self._hidden = self._decoder.embed(batch.token_ids)
        return self._decoder.pre(0, self._hidden, self._rotary)

    def between(self, layer: int, attended: torch.Tensor) -> QueryKeyValue:
        self._hidden = self._decoder.post(layer, self._hidden, attended)
        return self._decoder.pre(layer + 1, self._hidden, self._rotary)

    def end(self, attended: torch.Tensor) -> torch.Tensor:
        return self._decoder.post(self._decoder.spec.layers - 1, self._hidden, attended)


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """recordings: buckets recorded at once. buffer_bytes: of the static buffers, which bound the largest bucket too; what the
    recorded pieces need in between comes from one pool of memory that all recordings share. uses: of a bucket before it is
    recorded, so that a batch in passing does not pay for it."""

    recordings: int = 8
    buffer_bytes: int = 64 * 2**20
    uses: int = 4


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What the pieces read and write, at the size of a bucket."""

    token_ids: torch.Tensor  # int64 [bucket]
    rotary: torch.Tensor
    hidden: torch.Tensor
    attended: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def row_bytes(self) -> int:
        return sum(each.nbytes // len(each) for each in self._all())

    def rows(self, count: int) -> _Buffers:
        return _Buffers(*(each[:count] for each in self._all()))

    def sized(self, count: int) -> _Buffers:
        return _Buffers(*(each.new_zeros(count, *each.shape[1:]) for each in self._all()))

    def _all(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, self.rotary, self.hidden, self.attended, self.query, self.key, self.value)


@dataclass(frozen=True, slots=True)
class _Recording:
    begin: Callable[[], None]
    between: tuple[Callable[[], None], ...]
    end: Callable[[], None]


class DecodeGraphs:
    """Recordings of the pieces by bucket, made when a bucket has been asked for often enough; the one not used for the longest
    time makes room."""

    def __init__(self, decoder: Decoder, capture: Capture, limits: GraphLimits | None = None) -> None:
        self._decoder = decoder
        self._capture = capture
        self._limits = limits or GraphLimits()
        one = self._one_row()
        self.row_bytes = one.row_bytes
        most = self._limits.buffer_bytes // one.row_bytes
        self._buckets = tuple(bucket for bucket in BUCKETS if bucket <= most)
        largest = self._buckets[-1] if self._buckets else 0
        self.buffer_bytes = largest * one.row_bytes
        self._buffers = one.sized(largest)
        self._recordings: OrderedDict[int, _Recording] = OrderedDict()  # least recently used first
        self._uses: dict[int, int] = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        return tuple(self._recordings)

    def pieces(self, batch: StepBatch) -> GraphedPieces | None:
        """None: this step runs eagerly."""
        count = len(batch.parts)
        bucket = next((bucket for bucket in self._buckets if bucket >= count), None)
        if bucket is None or len(batch.token_ids) != count:
            return None
        recording = self._recording(bucket)
        return None if recording is None else GraphedPieces(self._decoder, self._buffers.rows(count), recording)

    def _recording(self, bucket: int) -> _Recording | None:
        if bucket in self._recordings:
            self._recordings.move_to_end(bucket)
            return self._recordings[bucket]
        self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if self._uses[bucket] < self._limits.uses:
            return None
        del self._uses[bucket]
        while len(self._recordings) >= self._limits.recordings:
            self._recordings.popitem(last=False)
        try:
            recording = self._record(self._buffers.rows(bucket))
        except RuntimeError as error:
            self._buckets = ()
            self._recordings.clear()
            _log.warning("cuda_graphs_given_up", bucket=bucket, error=str(error))
            return None
        self._recordings[bucket] = recording
        _log.info("cuda_graphs_recorded", bucket=bucket, recordings=len(self._recordings))
        return recording

    def _record(self, buffers: _Buffers) -> _Recording:
        last = self._decoder.spec.layers - 1
        return _Recording(
            self._capture(partial(self._begin, buffers)),
            tuple(self._capture(partial(self._between, layer, buffers)) for layer in range(last)),
            self._capture(partial(self._post, last, buffers)),
        )

    # ---- pieces over buffers

    def _begin(self, buffers: _Buffers) -> None:
        buffers.hidden.copy_(self._decoder.embed(buffers.token_ids))
        self._pre(0, buffers)

    def _between(self, layer: int, buffers: _Buffers) -> None:
        self._post(layer, buffers)
        self._pre(layer + 1, buffers)

    def _pre(self, layer: int, buffers: _Buffers) -> None:
        made = self._decoder.pre(layer, buffers.hidden, buffers.rotary)
        for target, source in zip((buffers.query, buffers.key, buffers.value), made, strict=True):
            target.copy_(source)

    def _post(self, layer: int, buffers: _Buffers) -> None:
        buffers.hidden.copy_(self._decoder.post(layer, buffers.hidden, buffers.attended))

    def _one_row(self) -> _Buffers:
        """A row computed once tells every shape and dtype."""
        token_ids = torch.zeros(1, dtype=torch.int64, device=self._decoder.device)
        with torch.no_grad():
            rotary = self._decoder.rotary(token_ids, 0)
            hidden = self._decoder.embed(token_ids)
            query, key, value = self._decoder.pre(0, hidden, rotary)
        return _Buffers(token_ids, rotary, hidden, torch.zeros_like(query), query, key, value)


class GraphedPieces:
    """Implements Pieces over a recording. `rows`: the buffers cut to the step's rows; the rest of a bucket keeps old content,
    which no row of the step reads."""

    def __init__(self, decoder: Decoder, rows: _Buffers, recording: _Recording) -> None:
        self._decoder = decoder
        self._rows = rows
        self._recording = recording

    def begin(self, batch: StepBatch) -> QueryKeyValue:
        self._rows.token_ids.copy_(batch.token_ids)
        self._rows.rotary.copy_(self._decoder.rotary(batch.positions, batch.highest_position))
        self._recording.begin()
        return self._rows.query, self._rows.key, self._rows.value

    def between(self, layer: int, attended: torch.Tensor) -> QueryKeyValue:
        self._rows.attended.copy_(attended)
        self._recording.between[layer]()
        return self._rows.query, self._rows.key, self._rows.value

    def end(self, attended: torch.Tensor) -> torch.Tensor:
        self._rows.attended.copy_(attended)
        self._recording.end()
        return self._rows.hidden


class CudaCapture:
    """Implements Capture with CUDA graphs that share one pool of memory: they are replayed one after the other.

    Not with torch.cuda.graph: it collects garbage and empties the allocator's cache at every capture, while streams wait.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Recorded kernels keep the priority of the stream that they were recorded on.
        self._stream = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)  # type: ignore[no-untyped-call]

    def __call__(self, piece: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            piece()  # libraries set themselves up for a stream in its first call, which a capture must not see
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                piece()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


def cuda_graphs(decoder: Decoder) -> DecodeGraphs | None:
    """None where the pieces cannot be recorded: off CUDA, and with experts, whose shapes depend on the routing."""
    if decoder.device.type != "cuda":
        return None
    if decoder.spec.experts is not None:
        _log.info("cuda_graphs_off", reason="experts wait for the device in every layer")
        return None
    return DecodeGraphs(decoder, CudaCapture())
