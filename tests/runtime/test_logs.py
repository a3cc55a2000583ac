import logging
import re

import pytest

from countersign.services.runtime.telemetry.logs import LineFormatter


def line(message: str, *, exception: BaseException | None = None, **fields: object) -> str:
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "created": 0.25, **fields})
    if exception is not None:
        record.exc_info = (type(exception), exception, exception.__traceback__)
    return LineFormatter("kv").format(record)


def test_a_record_is_time_level_service_message_and_fields() -> None:
    text = line("ready", address="127.0.0.1:1", blocks=3)
    assert text == "1970-01-01T00:00:00.250Z INFO kv ready address=127.0.0.1:1 blocks=3"


@pytest.mark.parametrize("value", ["two words", "", 'a"b', "a=b", "line\nbreak", "esc\x1b[31m"])
def test_a_value_that_could_be_misread_is_quoted(value: str) -> None:
    text = line("put", key=value)
    assert re.search(r' key="[^\n\x1b]*"$', text)


def test_a_traceback_stays_in_one_line() -> None:
    text = line("failed\nbadly", exception=ValueError("two\nlines"))
    assert "\n" not in text
    assert "ValueError: two" in text
