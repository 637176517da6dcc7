"""Text of others, as file and class names are, made safe to show."""

from __future__ import annotations

import re

_NO_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def printable(text: str) -> str:
    """`text` without control characters, which could steer a terminal: they appear as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def xml_text(text: str) -> str:
    """`text` without what XML 1.0 cannot hold: a replacement character stands for it."""
    return _NO_XML.sub("\ufffd", text)


def without_secrets(address: str) -> str:
    """An address of a store, for messages and logs, without what stands before its @."""
    return re.sub(r":/+.*@", "://…@", address)
