"""Owns logging: constant event names with fields, one line each on stderr, JSON or text."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Literal, TextIO

from service_kit.config import LogConfig

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_FIELDS_ATTRIBUTE = "pdserve_fields"
MAX_VALUE_CHARS = 2000  # of one field: a log line must not carry a prompt's megabytes


class EventLogger:
    """`log.info("worker_registered", worker_id="p0")`: the event's name is constant, everything variable is a field."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        self._emit(logging.DEBUG, event, fields, None)

    def info(self, event: str, **fields: object) -> None:
        self._emit(logging.INFO, event, fields, None)

    def warning(self, event: str, **fields: object) -> None:
        self._emit(logging.WARNING, event, fields, None)

    def error(self, event: str, **fields: object) -> None:
        self._emit(logging.ERROR, event, fields, None)

    def exception(self, event: str, error: BaseException, **fields: object) -> None:
        """Error with the traceback of `error`, also outside an except block."""
        self._emit(logging.ERROR, event, fields, error)

    def _emit(self, level: int, event: str, fields: Mapping[str, object], error: BaseException | None) -> None:
        if self._logger.isEnabledFor(level):
            trace = (type(error), error, error.__traceback__) if error is not None else None
            self._logger.log(level, "%s", event, exc_info=trace, extra={_FIELDS_ATTRIBUTE: dict(fields)})


def get_logger(name: str) -> EventLogger:
    return EventLogger(logging.getLogger(name))


def configure_logs(config: LogConfig, process: str, stream: TextIO | None = None) -> None:
    """Once per process, in `__main__`. Other libraries' records come out in the same form, from `warning` on."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(EventFormatter(config.format, process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[config.level])
    for foreign in ("grpc", "uvicorn", "uvicorn.access", "asyncio", "httpx", "httpcore"):
        logging.getLogger(foreign).setLevel(max(logging.WARNING, _LEVELS[config.level]))


class EventFormatter(logging.Formatter):
    """One line per record: ts (seconds since the epoch), level, process, logger, event, then the fields."""

    def __init__(self, form: Literal["json", "text"], process: str) -> None:
        super().__init__()
        self._form = form
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        found: object = getattr(record, _FIELDS_ATTRIBUTE, None)
        fields: dict[str, object] = {str(k): _plain(v) for k, v in found.items()} if isinstance(found, dict) else {}
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        if self._form == "text":
            return self._text(record, fields)
        head: dict[str, object] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        extra = {key: value for key, value in fields.items() if key not in head}
        return json.dumps(head | extra, ensure_ascii=False)

    def _text(self, record: logging.LogRecord, fields: Mapping[str, object]) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {self._process} {record.getMessage()}"
        trace = fields.get("traceback")
        pairs = [f"{key}={value}" for key, value in fields.items() if key != "traceback"]
        line = " ".join([head, *pairs])
        return f"{line}\n{trace}" if trace else line


def _plain(value: object) -> object:
    """JSON-ready, bounded form of a field's value."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in list(value)[:64]]
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "…"
