"""Owns reading the configuration: one YAML file plus `--set a.b=c`, refused as a whole if anything in it is wrong."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pdserve.errors import ConfigInvalid
from service_kit.config import ClusterConfig

Tree: TypeAlias = dict[str, object]

MAX_FILE_BYTES = 1 << 20
API_KEYS_VARIABLE = "PDSERVE_API_KEYS"


def load_config(path: Path | None, sets: Sequence[str] = ()) -> ClusterConfig:
    """Reads `path` (None = defaults), applies `sets` ("a.b=c", later ones win) and validates the whole tree.

    Raises ConfigInvalid with the dotted path, the value and the reason of everything that is wrong.
    """
    source = str(path) if path is not None else "--set"
    tree = _read_tree(path) if path is not None else {}
    for assignment in sets:
        _apply(tree, assignment)
    try:
        # JSON mode is strict about scalars (true is no number, "8" is no number) and still takes lists for tuples.
        return ClusterConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise ConfigInvalid(_describe(source, error)) from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key: object = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: str, source: str) -> object:
    try:
        loader = _StrictLoader(text)
        try:
            parsed: object = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{source}: not valid YAML: {error}") from error
    return parsed


def _read_tree(path: Path) -> Tree:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigInvalid(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no configuration is.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigInvalid(f"{path}: is no UTF-8 text: {error}") from error
    parsed = _parse_yaml(text, str(path))
    if parsed is None:
        return {}
    if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
        raise ConfigInvalid(f"{path}: must be a mapping of sections, for example `controller: {{port: 8000}}`.")
    return parsed


def _apply(tree: Tree, assignment: str) -> None:
    """Puts one "a.b=c" into the tree."""
    dotted, separator, text = assignment.partition("=")
    if not separator or not dotted:
        raise ConfigInvalid(f"--set {assignment}: must look like section.name=value.")
    parts = dotted.split(".")
    annotation = _annotation_at(parts, dotted)
    branch = tree
    for part in parts[:-1]:
        child = branch.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigInvalid(f"{dotted}: {part} is no section in the file, but {child!r}.")
        branch = child
    branch[parts[-1]] = text if _takes_text(annotation, text) else _parse_yaml(text, f"--set {dotted}")


def _annotation_at(parts: Sequence[str], dotted: str) -> object:
    section: type[BaseModel] = ClusterConfig
    for depth, part in enumerate(parts):
        info = section.model_fields.get(part)
        if info is None:
            raise ConfigInvalid(f"{dotted}: {_unknown(part, section)}")
        annotation: object = info.annotation
        last = depth == len(parts) - 1
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if last:
                raise ConfigInvalid(f"{dotted}: is a section; set one of {', '.join(annotation.model_fields)} in it.")
            section = annotation
        elif not last:
            raise ConfigInvalid(f"{dotted}: {'.'.join(parts[: depth + 1])} is a value and has nothing inside.")
        else:
            return annotation
    raise AssertionError("a dotted path has at least one part")


def _takes_text(annotation: object, text: str) -> bool:
    """True where the text of --set is the value itself, so that model.served_name=123 needs no quotes."""
    if isinstance(annotation, types.UnionType):
        return text != "null" and any(_takes_text(one, text) for one in get_args(annotation))
    return annotation in (str, Path) or get_origin(annotation) is Literal


def _unknown(name: str, section: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, section.model_fields, n=1)
    if "key" in name.split("_") or "keys" in name.split("_"):
        return f"unknown key. API keys come from the environment only: {API_KEYS_VARIABLE}."
    return (
        f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known: {', '.join(section.model_fields)}."
    )


def _describe(source: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        dotted = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{dotted}: {_unknown(str(location[-1]), _section_at(location[:-1]))}")
        else:
            lines.append(f"{dotted} = {problem['input']!r}: {problem['msg']}")
    return f"{source}: " + "; ".join(lines)


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = ClusterConfig
    for part in location:
        info = section.model_fields.get(str(part))
        if info is not None and isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            section = info.annotation
    return section
