"""Rounds of a comparison: everyone's turn in each, as many steps for all, and an end when the time is spent."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rounds import DECODE_CONTEXT, Effort, Prompt, decode_ms, prefill_rates


class Scripted:
    """Contender that claims `step_s` per step and notes its calls in a log shared with the others."""

    def __init__(self, name: str, step_s: float, log: list[str]) -> None:
        self.name = name
        self._step_s = step_s
        self._log = log
        self.prompts: list[Prompt] = []

    def begin(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def steps_s(self, count: int) -> list[float]:
        self._log.append(f"{self.name} {count}")
        return [self._step_s] * count

    def end(self) -> None:
        self._log.append(f"{self.name} ends")

    def prefill_s(self, prompt: Prompt) -> float:
        self.prompts.append(prompt)
        return self._step_s


def test_contenders_take_turns_with_as_many_steps_as_fit_the_slowest_ones_slice() -> None:
    log: list[str] = []
    fast, slow = Scripted("fast", 0.01, log), Scripted("slow", 0.5, log)
    samples = decode_ms([fast, slow], 3, Effort(2, 8, 1, slice_s=1.0, case_s=60.0))
    assert log == ["fast 2", "slow 2", "fast 2", "slow 2", "fast 2", "slow 2", "fast ends", "slow ends"]
    assert samples == [[10.0] * 4, [500.0] * 4]


def test_all_decode_the_same_prompts() -> None:
    one, other = Scripted("one", 0.1, []), Scripted("other", 0.1, [])
    decode_ms([one, other], 3, Effort(1, 1, 1, slice_s=1.0, case_s=60.0))
    assert one.prompts == other.prompts
    assert [len(prompt) for prompt in one.prompts] == [DECODE_CONTEXT] * 3


def test_a_step_longer_than_the_slice_is_still_measured() -> None:
    slow = Scripted("slow", 5.0, [])
    assert decode_ms([slow], 1, Effort(2, 8, 1, slice_s=1.0, case_s=60.0)) == [[5000.0, 5000.0]]


def test_a_case_whose_time_is_spent_ends_after_two_rounds() -> None:
    engine = Scripted("engine", 0.5, [])
    effort = Effort(10, 1, 10, slice_s=1.0, case_s=0.0)
    assert len(decode_ms([engine], 1, effort)[0]) == 2
    assert prefill_rates([engine], 100, effort) == [[200.0, 200.0]]


def test_every_prefill_gets_a_prompt_of_its_own() -> None:
    engine = Scripted("engine", 0.5, [])
    prefill_rates([engine], 100, Effort(1, 1, 3, slice_s=1.0, case_s=60.0))
    assert len({tuple(prompt) for prompt in engine.prompts}) == 4
