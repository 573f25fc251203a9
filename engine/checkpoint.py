"""Owns the reading of safetensors checkpoints: which file holds which tensor, shapes and dtypes checked, digest of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from pdserve.errors import ConfigInvalid, ModelUnsupported

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_FILES = 1024
_READ_BYTES = 4 * 2**20
_FLOAT_DTYPES = ("F32", "BF16", "F16")


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class _Handle(Protocol):
    """An open safetensors file; the library has no annotations of its own."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Located:
    file: int
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """All tensors of a model directory, read one at a time. A context manager: files are mapped while it is open."""

    def __init__(self, model_dir: Path) -> None:
        self.files = _files(model_dir)
        self._handles = [_open(path) for path in self.files]
        self._where: dict[str, _Located] = {}
        for number, handle in enumerate(self._handles):
            for name in handle.keys():  # noqa: SIM118 (a handle, not a dict)
                view = handle.get_slice(name)
                located = _Located(number, tuple(view.get_shape()), view.get_dtype())
                if self._where.setdefault(name, located) is not located:
                    raise ConfigInvalid(f"Tensor {name!r} is in two files of {model_dir}.")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._handles.clear()

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Tensor `name`, checked against `shape`, converted to `dtype`. Raises ConfigInvalid or ModelUnsupported."""
        located = self._where.get(name)
        if located is None:
            raise ConfigInvalid(f"The checkpoint lacks the tensor {name!r}.")
        if located.shape != tuple(shape):
            raise ConfigInvalid(
                f"Tensor {name!r} has shape {list(located.shape)}, but config.json asks for {list(shape)}."
            )
        if located.dtype not in _FLOAT_DTYPES:
            raise ModelUnsupported(
                f"Tensor {name!r} has dtype {located.dtype}; supported are {', '.join(_FLOAT_DTYPES)}."
            )
        stored = self._handles[located.file].get_tensor(name)
        return stored.to(dtype)

    def digest(self) -> str:
        """SHA-256 over the SHA-256 of every file (headers and content), in the order of their names. Hex."""
        with ThreadPoolExecutor(max_workers=min(4, len(self.files))) as pool:  # hashlib releases the GIL
            parts = list(pool.map(_file_digest, self.files))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _files(model_dir: Path) -> list[Path]:
    index = model_dir / _INDEX
    if index.is_file():
        names = _indexed_names(index)
    elif (model_dir / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        raise ConfigInvalid(
            f"{model_dir} holds neither {_SINGLE} nor {_INDEX}: only safetensors checkpoints are loaded."
        )
    return [model_dir / name for name in names]


def _indexed_names(index: Path) -> list[str]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ConfigInvalid(f"{index} is larger than {_MAX_INDEX_BYTES} bytes.")
    try:
        parsed: object = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigInvalid(f"{index} is not JSON: {error}.") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigInvalid(f"{index} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A path would let a checkpoint read files outside its directory.
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ConfigInvalid(f"{index} names {name!r}, which is no safetensors file beside it.")
        if not (index.parent / name).is_file():
            raise ConfigInvalid(f"{index} names {name!r}, which does not exist.")
    if len(names) > _MAX_FILES:
        raise ConfigInvalid(f"{index} names more than {_MAX_FILES} files.")
    return names


def _open(path: Path) -> _Handle:
    try:
        return cast(_Handle, safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise ConfigInvalid(f"{path} is not a whole safetensors file: {error}.") from error


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.digest()
