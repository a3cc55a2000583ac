"""Log lines on stderr: one a record, ``time level service message key=value``."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

# What every record has; the rest came by ``extra=``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """A record in one line, whatever its texts hold. Values with spaces, quotes or line ends are JSON strings."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        parts = [time, record.levelname, self._service, message, *(f"{key}={_text(fields[key])}" for key in fields)]
        return " ".join(parts)


def configure(service: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send all of the process's log records to ``stream`` (stderr by default), in place of what was set before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _text(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(" \"='")
    return text if plain else json.dumps(text, ensure_ascii=False)
