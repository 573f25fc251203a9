"""Owns what is unwanted in text that the model wrote: runs that it wrote before, tight loops, broken words."""

from dataclasses import dataclass
from itertools import accumulate

from training.readability import WORD, loops


@dataclass(frozen=True, slots=True)
class Spelling:
    """The text of every token, a byte a character, and the known words, in lower case."""

    pieces: tuple[str, ...]
    words: frozenset[str]

    def broken(self, tokens: list[int]) -> set[int]:
        """Return the places of the tokens that go on with a word that turns out unknown."""
        ends = list(accumulate(len(self.pieces[token]) for token in tokens))
        begins = [0, *ends]
        found: set[int] = set()
        for word in WORD.finditer("".join(self.pieces[token] for token in tokens)):
            # The text may end within its last word.
            if word.group().lower() in self.words or word.end() == ends[-1]:
                continue
            # The token in which the word begins may have been right.
            found.update(place for place in range(len(tokens)) if word.start() < begins[place] < word.end())
        return found


def repeated(tokens: list[int], run_length: int) -> set[int]:
    """Return the places of the tokens that end a run of `run_length` tokens that occurred before."""
    seen: set[tuple[int, ...]] = set()
    found: set[int] = set()
    for end in range(run_length, len(tokens) + 1):
        run = tuple(tokens[end - run_length : end])
        if run in seen:
            found.add(end - 1)
        seen.add(run)
    return found


def looping(tokens: list[int]) -> set[int]:
    """Return the places of the tokens that complete or prolong a loop."""
    return {place for place, _ in loops(tokens)}
