"""Owns what follows from a computed batch: scores of prompts, tokens drawn, sequences that go on, fork or end."""

from __future__ import annotations

import torch

from engine.block_tables import BlockTables
from engine.dispatch_desk import DispatchDesk
from engine.loaded_model import LoadedModel
from engine.protocol import EventSink, PromptLogprobs
from engine.sampler import BadLogits, Draw, Drawn, Sampler, logprob_rows
from engine.sequences import Sequence
from engine.step_batch import StepBatch
from engine.step_tokens import StepColumns
from pdserve.errors import PdserveError

_LOGPROB_ROWS = 256  # prompt rows whose logits are held at once


class Outcomes:
    """A part whose sequence was cancelled while it was computed, and so has no table, has none."""

    def __init__(self, model: LoadedModel, tables: BlockTables, desk: DispatchDesk, sink: EventSink) -> None:
        self._model = model
        self._tables = tables
        self._desk = desk
        self._sink = sink
        self._sampler = Sampler(model.spec.vocab, model.spec.eos_token_ids, model.device)

    def score_prompts(self, batch: StepBatch, hidden: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the computed ones, where they were asked for."""
        for part, start in zip(batch.parts, batch.starts, strict=True):
            sequence, work = part.sequence, part.sequence.state.work
            top = work.sampling.prompt_logprobs
            if top is None or sequence.table is None:
                continue
            end = min(sequence.computed + part.count, work.prompt_tokens - 1)
            for first in range(sequence.computed, end, _LOGPROB_ROWS):
                count = min(_LOGPROB_ROWS, end - first)
                row = start + first - sequence.computed
                following = torch.tensor(sequence.tokens[first + 1 : first + 1 + count], device=hidden.device)
                logits = self._model.decoder.head(hidden[row : row + count])
                sequence.prompt_rows += logprob_rows(logits, following.long(), top)

    def follow(self, batch: StepBatch, hidden: torch.Tensor, step: int) -> None:
        """Counts the computed tokens and draws. Frees the blocks of what ends."""
        drawing = self._advance(batch)
        if drawing:
            self._draw(batch, drawing, hidden, step)

    def _advance(self, batch: StepBatch) -> list[int]:
        """Returns the ordinals of the parts whose sequences draw now."""
        drawing: list[int] = []
        for ordinal, part in enumerate(batch.parts):
            sequence = part.sequence
            if sequence.table is None:
                continue
            sequence.computed += part.count
            if part.count == 1:
                self._tables.store_later(sequence.table, sequence.tokens, sequence.computed)
            else:
                self._tables.store(sequence.table, sequence.tokens, sequence.computed)
            if not sequence.missing:
                drawing.append(ordinal)
        return drawing

    def _draw(self, batch: StepBatch, drawing: list[int], hidden: torch.Tensor, step: int) -> None:
        """Draws for every choice of the sequences `drawing`, tells the tokens, then lets them go on, fork or end."""
        rows = torch.tensor([batch.last_row(ordinal) for ordinal in drawing], device=hidden.device)
        logits = self._model.decoder.head(hidden.index_select(0, rows))
        sequences = [batch.parts[ordinal].sequence for ordinal in drawing]
        drawn, bad = self._drawn(logits, sequences)
        columns = StepColumns(step, self._model.spec.eos_token_ids, self._model.max_context_tokens)
        going_on: list[dict[int, int]] = []
        for sequence, tokens in zip(sequences, drawn, strict=True):
            work, index = sequence.state.work, sequence.output_index
            going_on.append(
                {
                    choice: draw.token_id
                    for choice, draw in tokens.items()
                    if columns.add(work, choice, index, draw.token_id, draw.logprobs)
                }
            )
            if work.sampling.prompt_logprobs is not None and not sequence.forked:
                self._sink.emit(PromptLogprobs(work.dispatch, tuple(sequence.prompt_rows)))
        message = columns.message()
        if message is not None:
            self._sink.emit(message)
        for sequence, tokens_on in zip(sequences, going_on, strict=True):
            if sequence in bad:
                self._desk.fail(sequence, bad[sequence])
            else:
                self._go_on(sequence, tokens_on)

    def _drawn(
        self, logits: torch.Tensor, sequences: list[Sequence]
    ) -> tuple[list[dict[int, Drawn]], dict[Sequence, PdserveError]]:
        """Tokens by choice for each sequence, and the sequences whose logits cannot be drawn from."""
        owners = [(row, choice) for row, sequence in enumerate(sequences) for choice in sequence.choices]
        bad: dict[Sequence, PdserveError] = {}
        while True:
            owners = [(row, choice) for row, choice in owners if sequences[row] not in bad]
            draws = [_draw_of(sequences[row], choice) for row, choice in owners]
            try:
                drawn = self._sampler.draw(_rows_of(logits, owners), draws) if draws else []
                break
            except BadLogits as error:
                bad[sequences[owners[error.row][0]]] = error
        tokens: list[dict[int, Drawn]] = [{} for _ in sequences]
        for (row, choice), draw in zip(owners, drawn, strict=True):
            tokens[row][choice] = draw
        return tokens, bad

    def _go_on(self, sequence: Sequence, going_on: dict[int, int]) -> None:
        if not sequence.forked:
            self._desk.prompt_done(sequence, going_on)
        elif going_on:
            sequence.tokens.append(going_on[sequence.choices[0]])
        else:
            self._desk.end_choices(sequence.state, sequence.choices)


def _draw_of(sequence: Sequence, choice: int) -> Draw:
    work = sequence.state.work
    return Draw(work.sampling, choice, sequence.tokens, work.prompt_tokens)


def _rows_of(logits: torch.Tensor, owners: list[tuple[int, int]]) -> torch.Tensor:
    """One row of logits per choice; the choices of one sequence share a row."""
    rows = [row for row, _ in owners]
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
