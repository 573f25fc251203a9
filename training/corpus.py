"""The training text: documents read from the standard library of the running Python, chosen by name.

The choice is narrow on purpose: fifteen epochs of a few well-documented modules, where the whole library would get one or
two in the same time. The model card says what that gains and what it costs.
"""

import hashlib
import inspect
import pydoc_data.topics
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules (with or without ".py") and packages whose prose and code read well.
MODULES = (
    *("argparse", "bisect", "calendar", "cmd", "collections", "configparser", "contextlib", "csv", "dataclasses"),
    *("difflib", "enum", "fnmatch", "fractions", "functools", "glob", "graphlib", "hashlib", "heapq", "json"),
    *("linecache", "operator", "os", "pathlib", "queue", "random", "reprlib", "sched", "secrets", "shelve", "shlex"),
    *("shutil", "statistics", "string", "tempfile", "textwrap", "threading", "unittest/case"),
)
TESTS = ("bisect", "filecmp", "glob", "iter", "queue", "shelve", "sort", "textwrap")
COMPILED_MODULES = ("builtins", "itertools", "math", "posix", "sys", "time")
# Not trained on: their text only serves as prompts behind which the model is taught not to repeat itself.
PROMPT_MODULES = (
    *("base64", "datetime", "gzip", "http/client", "io", "pprint", "re", "socket", "subprocess", "traceback", "types"),
    *("urllib/request", "uuid", "weakref", "zipfile"),
)
HELD_OUT_MODULES = ("copy", "importlib/resources/_common", "plistlib", "timeit", "tomllib/_parser")
HELD_OUT_TOPICS = ("yield",)

PUBLIC_NAMES = {"posix": "os", "posixpath": "os.path", "builtins": ""}
MIN_DOCSTRING_CHARS = 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus; the name is a path relative to the library, or the name of a topic or module."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of each source, the ones that prompts are cut from, and the ones held out of training."""

    modules: tuple[Document, ...]
    tests: tuple[Document, ...]
    manual: tuple[Document, ...]
    prompts: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def digest(self) -> str:
        """Return the SHA-256 of every training document, in order, as hexadecimal."""
        state = hashlib.sha256()
        for document in (*self.modules, *self.tests, *self.manual):
            state.update(f"{document.name}\0{document.text}\0".encode())
        return state.hexdigest()


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path | None = None) -> Corpus:
    """Read the corpus from the standard library at `root` (default: that of the running Python)."""
    base = root or library_root()
    topics = tuple(_topics())
    return Corpus(
        modules=tuple(_sources(base, MODULES)),
        tests=tuple(_sources(base, tuple(f"test/test_{name}" for name in TESTS))),
        manual=(*(t for t in topics if not _is_held_out(t)), *_compiled_manuals()),
        prompts=tuple(_sources(base, PROMPT_MODULES)),
        held_out=(*_sources(base, HELD_OUT_MODULES), *(t for t in topics if _is_held_out(t))),
    )


def _is_held_out(topic: Document) -> bool:
    return topic.name.removeprefix("topic:") in HELD_OUT_TOPICS


def _sources(base: Path, names: tuple[str, ...]) -> Iterator[Document]:
    """Yield the files of each module or package; a name that this Python lacks yields nothing."""
    for name in names:
        file, package = base / f"{name}.py", base / name
        for path in [file] if file.is_file() else sorted(package.glob("*.py")):
            yield Document(path.relative_to(base).as_posix(), path.read_text(encoding="utf-8"))


def _topics() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topic:{name}", text.strip() + "\n")


def _compiled_manuals() -> Iterator[Document]:
    for module_name in COMPILED_MODULES:
        entries = "\n\n".join(f"{name}\n\n{indented(text)}" for name, text in compiled_docstrings(module_name))
        yield Document(f"manual:{module_name}", entries + "\n")


def indented(text: str) -> str:
    return "\n".join("    " + line if line else "" for line in text.splitlines())


def compiled_docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """Yield (public name, docstring) of a module written in C, and of the methods of its classes."""
    module = sys.modules.get(module_name) or __import__(module_name)
    prefix = PUBLIC_NAMES.get(module_name, module_name)
    for name in sorted(vars(module)):
        # Hooks and helpers written in Python (site, pytest, torch put them there) are not part of the module; sys keeps
        # the original of a replaced hook between underscores.
        original = f"__{name}__" if name.endswith("hook") else name
        member: object = getattr(module, original, getattr(module, name))
        if name.startswith("_") or not isinstance(member, type | types.BuiltinFunctionType):
            continue
        public = f"{prefix}.{name}" if prefix else name
        yield from _documented(public, member)
        if isinstance(member, type) and not issubclass(member, BaseException):
            for method in sorted(m for m in vars(member) if not m.startswith("_")):
                yield from _documented(f"{public}.{method}", getattr(member, method))


def _documented(name: str, member: object) -> Iterator[tuple[str, str]]:
    text = inspect.getdoc(member)
    if text and len(text) > MIN_DOCSTRING_CHARS:
        yield name, text
