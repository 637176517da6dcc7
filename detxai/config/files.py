"""YAML files of settings, read with care: they may come from anywhere."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from detxai.errors import UsageError

#: A file of settings has a few kilobytes.
MAX_BYTES = 1_000_000
_SHOW, _CHECK = "`detxai config show` prints what is right.", "Check its path."
#: What PyYAML raises for damaged or hostile documents beside its own errors.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and aliases, in which `no` and `on` are words, as they are in class names."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"aliases are not taken: write *{event.anchor} out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else repr(key)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name!r}", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, origin: str) -> Any:
    """The document `text`; UsageError, with its line, for what is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{origin}{line}: malformed YAML: {error.problem}.", _SHOW) from error
    except RecursionError as error:
        raise UsageError(f"{origin}: malformed YAML: it is nested too deeply.", _SHOW) from error
    except (yaml.YAMLError, *_DAMAGE) as error:
        raise UsageError(f"{origin}: malformed YAML: {str(error).splitlines()[0]}.", _SHOW) from error


def read(file: Path) -> str:
    """The text of a regular file of sane size. Raises UsageError."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"Cannot read the config file {file}: it is no regular file.", _CHECK)
        if status.st_size > MAX_BYTES:
            raise UsageError(f"Cannot read the config file {file}: it is larger than {MAX_BYTES:,} bytes.", _CHECK)
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"Cannot read the config file {str(file)[:200]}: {reason}.", _CHECK) from error
