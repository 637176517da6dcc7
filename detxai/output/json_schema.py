"""What a record and a summary hold, for machines (JSON Schema) and for people (a table of fields)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel

from detxai.output.records import Record
from detxai.output.summary import Summary


def schema(kind: Literal["record", "summary"]) -> dict[str, Any]:
    """JSON Schema of a written record or summary."""
    model: type[BaseModel] = Record if kind == "record" else Summary
    return model.model_json_schema(by_alias=True, mode="validation")


def field_table(model: type[BaseModel] = Record) -> str:
    """A Markdown table of every field with its meaning, parts in dotted names (`[]`: a list)."""
    rows = (f"| `{name}` | {text} |" for name, text in _fields(model, ""))
    return "\n".join(["| field | meaning |", "|---|---|", *rows]) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        parts = [p for p in _leaves(field.annotation) if isinstance(p, type)]
        inner = [p for p in parts if issubclass(p, BaseModel)]
        label = prefix + (field.alias or name)
        if inner:
            listed = "[]" if "tuple" in str(field.annotation) else ""
            yield from _fields(inner[0], f"{label}{listed}.")
        else:
            yield label, (field.description or "").replace("|", "\\|")


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation such as `tuple[Part, ...] | None`."""
    inner = get_args(annotation)
    for part in inner:
        yield from _leaves(part)
    if not inner:
        yield annotation
