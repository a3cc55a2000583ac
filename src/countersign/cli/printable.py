"""What a stranger wrote, made harmless to look at."""

from __future__ import annotations

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
"""For ``str.translate``: control characters but tab and newline become pictures, so that they steer no terminal."""

PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
