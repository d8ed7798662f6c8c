"""Text that somebody else wrote, made fit to be shown."""

from __future__ import annotations

import re
from typing import Final

ESCAPE: Final = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|.)", re.DOTALL)
"""What a terminal obeys: colours, the cursor, the window's title."""


def plain(text: str) -> str:
    """Return text without escapes and control characters; a carriage return ends a line, too."""
    lines = ESCAPE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(letter for letter in lines if letter in "\n\t" or letter.isprintable())


def last_lines(text: str, lines: int, width: int) -> str:
    """Return the end of a text, no line longer than `width`."""
    found = plain(text).rstrip().split("\n")[-lines:]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in found)
