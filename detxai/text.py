"""Text of others, as file and class names are, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` without control characters, which could steer a terminal: they appear as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
