"""The field of a row that holds the prompt: finding it, choosing it, and listing the fields that are there."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

# Taken if no field is given, and a file has one of them. The last one is that of COCO's captions.
USUAL_FIELDS = ("caption", "text", "prompt", "captions", "prompts", "txt", "annotations.caption")
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 8, 40


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row, or a text of a row, that cannot be used: the reason."""

    reason: str


Value = str | dict[str, Any] | Bad | None
"""A row: a text, an object with fields, a bad row, or None where the row lacks the field."""


def spelling(name: str) -> str:
    """Returns a name without the differences that do not matter: case, spaces and a colon at its end."""
    return name.strip().removesuffix(":").strip().casefold()


def value_at(row: Any, field: str) -> Any:
    """Returns the value at a path with dots, or None. If a list is on the way, returns a list of its items' values.

    A name with the same spelling is preferred to one with another spelling, unless its value is empty.
    """
    return _value_at(row, field.split("."))


def _value_at(value: Any, names: list[str]) -> Any:
    if not names:
        return value
    if isinstance(value, list):
        values: list[Any] = []
        for item in value:
            found = _value_at(item, names)
            values += found if isinstance(found, list) else [found]
        return [found for found in values if found is not None]
    if not isinstance(value, dict):
        return None
    spellings = sorted((key for key in value if spelling(key) == spelling(names[0])), key=lambda key: key != names[0])
    candidates = [_value_at(value[key], names[1:]) for key in spellings]
    candidates = [candidate for candidate in candidates if candidate is not None]
    for candidate in candidates:
        if candidate:
            return candidate
    return candidates[0] if candidates else None


def usual_fields(row: Mapping[str, Any]) -> list[str]:
    """Returns those of USUAL_FIELDS that a row has."""
    return [name for name in USUAL_FIELDS if value_at(row, name) not in (None, [])]


def usual_field(row: Mapping[str, Any]) -> str:
    """Returns the one of USUAL_FIELDS that a row has.

    Raises:
        ValueError: the row has none of them, or several. The error lists the fields of the row.
    """
    found = usual_fields(row)
    if len(found) == 1:
        return found[0]
    problem = f"has the fields {' and '.join(found)}" if found else "has no field with a usual name, such as caption"
    raise ValueError(f"{problem}: name the prompt's field (--field); {listed(row)}")


def named_column(names: list[str], field: str) -> str | None:
    """Returns the column whose name is the first one of a field, in any spelling. None if there is none."""
    first = field.split(".")[0]
    return next(
        (name for name in names if name == first),
        next((name for name in names if spelling(name) == spelling(first)), None),
    )


def listed(row: Mapping[str, Any]) -> str:
    """The fields of a row for an error, each with an example: `its fields are id (7), title ('a red apple')`."""
    found = list(_leaves(row))
    shown = ", ".join(f"{name} ({_example(value)})" for name, value in found[:_SHOWN_FIELDS])
    more = f" and {len(found) - _SHOWN_FIELDS} more" if len(found) > _SHOWN_FIELDS else ""
    return f"its fields are {shown or 'none'}{more}"


def _leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the fields below a value that hold no other fields, with their names with dots and their values."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, Mapping) and value and depth < 4:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif name:
        yield name, value


def _example(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{type(value).__name__} of {len(value)}"
    text = value if isinstance(value, str) else repr(value)
    cut = f"{text[:_SHOWN_CHARACTERS]}..." if len(text) > _SHOWN_CHARACTERS else text
    return repr(cut) if isinstance(value, str) else cut
