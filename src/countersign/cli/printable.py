"""What a stranger wrote, made harmless to look at."""

from __future__ import annotations

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""For ``str.translate``: control characters but tab and newline become pictures, so that they steer no terminal."""

PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

_LINE = PICTURES | {ord("\t"): 0x2409, ord("\n"): 0x240A}


def in_one_line(text: str) -> str:
    """As it stands within a line: no line ends, nothing that is written from right to left or is not to be seen."""
    shown = text.translate(_LINE)
    return shown if shown.isprintable() else "".join(each if each.isprintable() else "�" for each in shown)
