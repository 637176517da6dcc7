"""Classes as people name them, by id or name, as the ids of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detxai.config.parse import nearest
from detxai.errors import UsageError

#: Most names that an error lists.
MOST = 20


def class_ids(wanted: Sequence[int | str], names: Mapping[int, str], option: str) -> list[int]:
    """The ids of what is `wanted` (ids, names; of one name all classes), in order and each once.

    `id:3` and `name:3` tell an id from a name that is a number. A name may hold a comma: only what is no name is taken
    apart. Raises UsageError for a class that the model does not have, and for a number that may mean two.
    """
    ids: list[int] = []
    for item in wanted:
        whole = not isinstance(item, str) or any(_meanings(item, names))
        for part in [item] if whole else [p.strip() for p in str(item).split(",")]:
            by_id, by_name = _meanings(part, names)
            if not by_id and not by_name:
                raise _unknown(part, names, option)
            other = next((i for i in by_name if i not in by_id), None)
            if by_id and other is not None:
                raise UsageError(
                    f"{option} {part}: that is the id of {names[by_id[0]]!r}, and the name of class {other}.",
                    f"Write id:{part} or name:{part}.",
                )
            ids += by_id or by_name
    return list(dict.fromkeys(ids))


def _meanings(item: int | str, names: Mapping[int, str]) -> tuple[list[int], list[int]]:
    """The ids that `item` means as an id and as a name."""
    text = str(item)
    by_name = [i for i, name in names.items() if name == text]
    if by_name or not text.startswith(("id:", "name:")):
        return [i for i in names if str(i) == text], by_name
    kind, _, rest = text.partition(":")
    by_id, by_name = _meanings(rest, names)
    return (by_id, []) if kind == "id" else ([], by_name)


def _unknown(part: int | str, names: Mapping[int, str], option: str) -> UsageError:
    shown = list(names.values())
    more = f", … ({len(shown)} in all)" if len(shown) > MOST else ""
    return UsageError(
        f"{option}: the model has no class {part!r}{nearest(str(part), shown) or '.'}",
        f"It has: {', '.join(shown[:MOST])}{more}.",
    )
