"""Checks the fields of a dataclass against their annotations: types, ranges and choices."""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

MAX_SHOWN = 100  # characters of a wrong value in an error


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed values of a number: low <= value <= high, or without one of the ends.

    Attributes:
        low: the lowest value.
        high: the highest value; None if there is no limit.
        above_low: `low` is not allowed.
        below_high: `high` is not allowed.
    """

    low: float
    high: float | None = None
    above_low: bool = False
    below_high: bool = False

    def holds(self, value: float) -> bool:
        """Says whether a value is in the range."""
        low_holds = value > self.low if self.above_low else value >= self.low
        if self.high is None:
            return low_holds
        return low_holds and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.above_low else '>='} {self.low}"
        if self.above_low or self.below_high:
            return f"in {'(' if self.above_low else '['}{self.low}, {self.high}{')' if self.below_high else ']'}"
        return f"between {self.low} and {self.high}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The allowed values of a text."""

    values: tuple[str, ...]


def one_of(values: Sequence[str]) -> Choice:
    """The choice among some texts, such as the keys of a registry."""
    return Choice(tuple(values))


def check_fields(instance: Any, section: str) -> None:
    """Checks every field of a dataclass against its annotation.

    An annotation is `int`, `float`, `bool`, `str` or `tuple[str, ...]`. It may be `Annotated` with a Range or a Choice,
    and it may be `| None`. A float field takes an int, too. No number may be NaN or infinite.

    Args:
        instance: of the dataclass.
        section: the name of the dataclass in errors.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    for name, annotation in typing.get_type_hints(type(instance), include_extras=True).items():
        expected, holds = _check(annotation, getattr(instance, name))
        if not holds:
            raise ValueError(f"{section}.{name} must be {expected}, got {shown(getattr(instance, name))}")


def without_none(annotation: Any) -> Any | None:
    """`int` for the annotation `int | None`; None for an annotation that does not allow None."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return None
    inner, none = typing.get_args(annotation)
    assert none is type(None), annotation
    return inner


def shown(value: Any) -> str:
    """A value for an error: its repr, cut to MAX_SHOWN characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        return f"a {type(value).__name__} of too many digits"
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def _check(annotation: Any, value: Any) -> tuple[str, bool]:
    """Checks a value against an annotation. Returns a text of the expected values, and True if the value is one."""
    if (inner := without_none(annotation)) is not None:
        expected, holds = _check(inner, value)
        return f"{expected} or None", holds or value is None
    limit: Any = None
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, limit = typing.get_args(annotation)
    if annotation is bool:
        return "True or False", type(value) is bool
    if annotation is str:
        if limit is not None:
            return f"among {list(limit.values)}", type(value) is str and value in limit.values
        return "a text", isinstance(value, str)
    if annotation == tuple[str, ...]:
        is_tuple = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
        return "a tuple of texts", is_tuple
    assert annotation in (int, float), annotation
    expected = "an integer" if annotation is int else "a finite number"
    return expected + (f" {limit}" if limit is not None else ""), _is_number(annotation, value, limit)


def _is_number(kind: type, value: Any, limit: Range | None) -> bool:
    if type(value) is not int and (kind is int or not isinstance(value, float)):
        return False
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer that is larger than every float
        is_finite = kind is int
    return is_finite and (limit is None or limit.holds(value))
