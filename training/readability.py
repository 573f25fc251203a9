"""What readable means for generated text: measures that noise and tight loops fail and library text passes."""

import io
import re
import tokenize
from collections.abc import Iterable, Iterator

WORD = re.compile(r"[A-Za-z]{2,}")
MIN_LOOP_TOKENS = 8
LONGEST_PERIOD = 64  # tokens of a run


def library_words(texts: Iterable[str]) -> frozenset[str]:
    """Return every word of two letters or more, in lower case; identifiers count by their parts between underscores."""
    return frozenset(word.lower() for text in texts for word in WORD.findall(text))


def known_word_share(text: str, words: frozenset[str]) -> float:
    """Return the share of the words of `text` that are in `words`; 0 for a text without words."""
    found = WORD.findall(text)
    return sum(word.lower() in words for word in found) / len(found) if found else 0.0


def printable_share(text: str) -> float:
    """Return the share of characters that print, line breaks included; a broken UTF-8 sequence does not."""
    readable = sum(
        character.isprintable() or character == "\n" for character in text if character != "\N{REPLACEMENT CHARACTER}"
    )
    return readable / len(text) if text else 0.0


def distinct_share(tokens: list[int]) -> float:
    """Return the number of different tokens over the number of tokens: a loop of k tokens tends to k / length."""
    return len(set(tokens)) / len(tokens) if tokens else 0.0


def longest_loop(tokens: list[int]) -> int:
    """Return the length in tokens of the longest stretch that is one run of tokens said at least twice in a row."""
    return max((length for _, length in loops(tokens)), default=0)


def loops(tokens: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the place of every token that ends a stretch of a run said at least twice in a row, and its length so far.

    Runs of up to 64 tokens count, and stretches of at least eight: "0, 0, 0" is no loop.
    """
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 2) + 1):
        same = 0
        for place in range(period, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - period] else 0
            if same >= period and same + period >= MIN_LOOP_TOKENS:
                yield place, same + period


def python_line_share(code: str) -> float:
    """Return the share of non-blank lines that Python's tokenizer accepts, each alone and without its brackets."""
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    return sum(map(_is_python_line, lines)) / len(lines) if lines else 0.0


def _is_python_line(line: str) -> bool:
    # A line of a larger expression or docstring may open or close what is not on it.
    alone = re.sub(r"[\[\](){}]", " ", line).replace('"""', "").strip().rstrip("\\")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(alone + "\n").readline))
    except (tokenize.TokenError, IndentationError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)
