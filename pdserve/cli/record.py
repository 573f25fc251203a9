"""Owns reading JSON that came from elsewhere: a record whose fields are asked for by type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn

from pdserve.errors import InternalError


class Record:
    """A JSON object. Every getter raises InternalError where the field is missing or of another type."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    @classmethod
    def of(cls, value: object) -> Record:
        if not isinstance(value, dict):
            raise InternalError(f"a JSON object was expected, not {str(value)[:200]!r}")
        return cls({str(name): field for name, field in value.items()})

    @classmethod
    def parse(cls, text: str | bytes) -> Record:
        try:
            return cls.of(json.loads(text))
        except ValueError as error:
            raise InternalError(f"not JSON: {str(text[:200])!r}") from error

    def plain(self) -> Mapping[str, object]:
        return self._fields

    def has(self, name: str) -> bool:
        """True where the field is there and not null."""
        return self._fields.get(name) is not None

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        return value if isinstance(value, str) else self._wrong(name, "text")

    def integer(self, name: str) -> int:
        value = self._fields.get(name)
        return value if isinstance(value, int) else self._wrong(name, "an integer")

    def number(self, name: str) -> float:
        value = self._fields.get(name)
        return float(value) if isinstance(value, int | float) else self._wrong(name, "a number")

    def truth(self, name: str) -> bool:
        value = self._fields.get(name)
        return value if isinstance(value, bool) else self._wrong(name, "true or false")

    def record(self, name: str) -> Record:
        value = self._fields.get(name)
        return Record.of(value) if isinstance(value, dict) else self._wrong(name, "an object")

    def records(self, name: str) -> list[Record]:
        value = self._fields.get(name)
        return [Record.of(one) for one in value] if isinstance(value, list) else self._wrong(name, "a list")

    def texts(self, name: str) -> list[str]:
        value = self._fields.get(name)
        return [str(one) for one in value] if isinstance(value, list) else self._wrong(name, "a list")

    def numbers(self, name: str) -> Mapping[str, float]:
        """An object of numbers."""
        fields = self.record(name)
        return {key: fields.number(key) for key in fields.plain()}

    def _wrong(self, name: str, wanted: str) -> NoReturn:
        raise InternalError(f"field {name!r} should be {wanted}, not {str(self._fields.get(name))[:200]!r}")
