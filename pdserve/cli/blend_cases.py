"""Owns what `verify --blend` sends: prompts of several chunks, of built-in notes or from a file. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from pdserve.errors import InvalidRequest

MOST_NOTES = 6
LEAST_NOTES = 2
MAX_LINES = 10_000

_PEOPLE = ("Mara", "Jonas", "Amina", "Pavel", "Ines", "Tomas", "Leila", "Oskar", "Nadia", "Hugo", "Selma", "Victor")
_TOWNS = ("Harwick", "Lindau", "Tornby", "Castell", "Evora", "Brenn", "Oldmere", "Savona", "Kirkby", "Melk")
_TRADES = ("a bakery", "a ferry", "a printing house", "a school", "a watchmaker's shop", "a lighthouse", "a mill")
_TOOLS = ("a brass lamp", "an iron scale", "a wooden ladder", "a copper kettle", "a glass barometer", "a leather map")
_COLOURS = ("red", "green", "white", "black", "yellow", "grey", "brown")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class BlendCase:
    """token_ids: the prompt. chunks: [start, end) of it, in order."""

    name: str
    token_ids: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]


def built_in_cases(count: int, limit_tokens: int, tokenize: Tokenize, rng: Random) -> list[BlendCase]:
    """Notes about people, and the beginning of a sentence that stands in one of them: what follows can be looked up there.

    limit_tokens: of a prompt. Raises InvalidRequest where not even two notes fit.
    """
    return [_case(f"notes {number + 1}", limit_tokens, tokenize, rng) for number in range(count)]


def _case(name: str, limit_tokens: int, tokenize: Tokenize, rng: Random) -> BlendCase:
    people = rng.sample(_PEOPLE, rng.randint(3, MOST_NOTES))
    notes = [(person, rng.choice(_TOOLS)) for person in people]
    asked = rng.choice(notes)
    question = tokenize(f"\n\nQuestion: What hangs over the door of {asked[0]}?\nAnswer: Over the door hangs")
    opening = tokenize("Notes about some people.\n\n")
    token_ids, chunks = list(opening), list[tuple[int, int]]()
    for person, tool in notes:
        note = tokenize(_note(person, tool, rng) + "\n\n")
        if len(token_ids) + len(note) + len(question) > limit_tokens:
            break
        chunks.append((len(token_ids), len(token_ids) + len(note)))
        token_ids += note
    if len(chunks) < LEAST_NOTES:
        raise InvalidRequest(
            f"The context, {limit_tokens} tokens, has no room for two notes. Give prompts of your own: --prompts FILE"
        )
    return BlendCase(name, (*token_ids, *question), tuple(chunks))


def _note(person: str, tool: str, rng: Random) -> str:
    town, trade, colour, day = (rng.choice(some) for some in (_TOWNS, _TRADES, _COLOURS, _DAYS))
    year, rooms = rng.randint(1850, 1990), rng.randint(2, 9)
    return (
        f"Note about {person}. {person} lives in {town} and runs {trade} there since {year}. The house has {rooms} rooms and a "
        f"{colour} roof. Over the door of {person} hangs {tool}, which came from {rng.choice(_TOWNS)}. On {day} the house stays "
        f"closed, because {person} visits {rng.choice(_PEOPLE)} on the other side of the river."
    )


def cases_of_lines(lines: Iterable[str], source: str) -> list[BlendCase]:
    """One JSON object per line: {"token_ids": [...], "chunks": [[start, end], ...]}. Raises InvalidRequest with the line's number."""
    cases: list[BlendCase] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(cases) >= MAX_LINES:
            raise InvalidRequest(f"{source} has more than {MAX_LINES} prompts. Give fewer: a few hundred tell enough.")
        cases.append(_case_of(line, f"{source}:{number}"))
    if not cases:
        raise InvalidRequest(f"{source} has no prompt.")
    return cases


def _case_of(line: str, place: str) -> BlendCase:
    try:
        fields = json.loads(line)
        token_ids = tuple(_whole(token) for token in fields["token_ids"])
        chunks = tuple((_whole(start), _whole(end)) for start, end in fields["chunks"])
    except (ValueError, TypeError, KeyError) as error:
        shape = '{"token_ids": [1, 2, ...], "chunks": [[0, 40], ...]}'
        raise InvalidRequest(f"{place}: must be an object like {shape}: {error!r}") from error
    return BlendCase(place, token_ids, chunks)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value
