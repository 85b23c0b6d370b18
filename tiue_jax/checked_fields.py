"""Types, ranges and choices of values that come from outside: settings, the fields of JSON files, and arguments.

A dataclass declares them in its annotations, and `check_fields` checks an instance. `read` makes an instance from the
object in a JSON file. `check` checks one argument. An annotation is one of these, or a union of them:

    bool, int, float, str, None, Any, dict
    Annotated[int, Range(1, 9)], Annotated[float, Range(0)], Annotated[str, one_of(["a", "b"])]
    tuple[int, ...], tuple[int, int], Annotated[tuple[int, ...], Items(1, 16)], dict[str, int]
    a dataclass

An int is allowed where a float is declared. No number may be NaN or infinite.
"""

import dataclasses
import functools
import math
import numbers
import operator
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

MAX_SHOWN = 100  # characters of a wrong value in an error

T = TypeVar("T")


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


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, since a registry has no hash
class Choice:
    """The allowed values, where there are few. A registry is looked up when a value is checked."""

    values: Collection[Any]

    def holds(self, value: Any) -> bool:
        """Says whether a value is one of the choices."""
        return value in self.values

    def __str__(self) -> str:
        return f"among {list(self.values)}"


@dataclasses.dataclass(frozen=True)
class Items:
    """The allowed number of entries of a tuple: low to high."""

    low: int
    high: int

    def holds(self, value: Collection[Any]) -> bool:
        """Says whether a tuple has an allowed number of entries."""
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"with {self.low} to {self.high} entries"


def one_of(values: Collection[Any]) -> Choice:
    """The choice among some values, such as the keys of a registry."""
    return Choice(values)


def check_fields(instance: Any, section: str = "") -> None:
    """Checks every field of a dataclass against its annotation. A list is no tuple here, and 8.0 is no int.

    Args:
        instance: of the dataclass.
        section: begins the names of fields in errors, such as "train" for "train.seed".

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    cls: Any = type(instance)
    for name, annotation in _annotations(cls).items():
        value = getattr(instance, name)
        try:
            _fit(annotation, value, lenient=False)
        except _UnfitError:
            expected, _ = _describe(annotation, lenient=False)
            raise ValueError(f"{_named(section, name)} must be {expected}, got {shown(value)}") from None


def read(cls: type[T], given: Any, section: str = "") -> T:
    """Makes an instance of a dataclass from the object in a JSON file. Other fields of the object are not looked at.

    A list is read as a tuple. A number like 8.0 is read as an int where an int is declared, since diffusers writes
    such numbers.

    Args:
        cls: the dataclass.
        given: the object.
        section: begins the names of fields in errors.

    Raises:
        ValueError: naming the field that is missing or wrong, its value and what was expected.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{section or 'the value'} must be an object with fields, got {shown(given)}")
    kind: Any = cls
    annotations = _annotations(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # typing has no name for dataclasses
        if field.name in given:
            fields[field.name] = check(_named(section, field.name), annotations[field.name], given[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            expected, _ = _describe(annotations[field.name], lenient=True)
            raise ValueError(f"{_named(section, field.name)} is missing, expected {expected}")
    return cls(**fields)


def check_others(cls: type, given: Any, section: str, fixed: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
    """Checks the fields of a JSON object that are no fields of a dataclass.

    Args:
        cls: the dataclass.
        given: the object.
        section: begins the names of fields in errors.
        fixed: fields for which only one value is supported, with that value.
        ignored: fields without influence.

    Raises:
        ValueError: naming a field that is unknown, or that has a value that is not supported.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{section or 'the value'} must be an object with fields, got {shown(given)}")
    known = {field.name for field in dataclasses.fields(cls)}
    for name, value in given.items():
        if name in known or name in ignored:
            continue
        if name not in fixed:
            raise ValueError(f"{_named(section, shown_name(name))} is not a supported field, got {shown(value)}")
        if (tuple(value) if isinstance(value, list) else value) != fixed[name]:
            raise ValueError(f"{_named(section, name)} must be {fixed[name]!r}, got {shown(value)}")


def check(name: str, annotation: Any, value: Any) -> Any:
    """Checks one value, such as an argument. Returns it as plain Python numbers and tuples.

    Raises:
        ValueError: beginning with `name`, with the value and what was expected.
    """
    try:
        return _fit(annotation, value, lenient=True)
    except _UnfitError:
        expected, _ = _describe(annotation, lenient=True)
        raise ValueError(f"{name} must be {expected}, got {shown(value)}") from None


def without_none(annotation: Any) -> Any | None:
    """`int` for the annotation `int | None`; None for an annotation that does not allow None."""
    alternatives = _alternatives(annotation)
    if len(alternatives) < 2 or type(None) not in alternatives:
        return None
    return functools.reduce(operator.or_, (kind for kind in alternatives if kind is not type(None)))


def shown(value: Any) -> str:
    """A value for an error: its repr, cut to MAX_SHOWN characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print an integer of more than 4,300 digits
        return f"a {type(value).__name__} that is too large to print"
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def shown_name(name: Any) -> str:
    """The name of a field for an error, in one line and cut to MAX_SHOWN characters."""
    text = " ".join(str(name).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


class _UnfitError(Exception):
    """A value does not fit its annotation."""


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _named(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


class _Parsed(typing.NamedTuple):
    """The parts of an annotation that is no union: `tuple[int, ...]` with limits has the kind tuple."""

    kind: Any
    arguments: tuple[Any, ...]
    limits: tuple[Any, ...]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _parse(annotation: Any) -> _Parsed:
    limits: list[Any] = []
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *limits = typing.get_args(annotation)
    return _Parsed(typing.get_origin(annotation) or annotation, typing.get_args(annotation), tuple(limits))


@functools.cache
def _parse_all(annotation: Any) -> tuple[_Parsed, ...]:
    return tuple(map(_parse, _alternatives(annotation)))


def _fit(annotation: Any, value: Any, lenient: bool) -> Any:
    """Returns a value that fits an annotation. If `lenient`, it is converted to plain Python numbers and tuples.

    Raises:
        _UnfitError: the value does not fit.
    """
    for parsed in _parse_all(annotation):
        try:
            fitting = _fit_one(parsed, value, lenient)
        except _UnfitError:
            continue
        if all(limit.holds(fitting) for limit in parsed.limits):
            return fitting
    raise _UnfitError


def _fit_one(parsed: _Parsed, value: Any, lenient: bool) -> Any:
    """As `_fit`, for an annotation that is no union, and without its limits."""
    kind, arguments, _ = parsed
    if kind is tuple:
        return _fit_tuple(arguments, value, lenient)
    if kind is int or kind is float:
        return _fit_number(kind, value, lenient)
    if kind is Any:
        return value
    if type(value) is not kind if kind is bool else not isinstance(value, kind):
        raise _UnfitError
    if kind is dict and arguments:
        return {_fit(arguments[0], name, lenient): _fit(arguments[1], inner, lenient) for name, inner in value.items()}
    return value


def _fit_tuple(arguments: tuple[Any, ...], value: Any, lenient: bool) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list if lenient else tuple):
        raise _UnfitError
    if arguments[-1] is Ellipsis:
        return tuple(_fit(arguments[0], entry, lenient) for entry in value)
    if len(value) != len(arguments):
        raise _UnfitError
    return tuple(_fit(kind, entry, lenient) for kind, entry in zip(arguments, value, strict=True))


def _fit_number(kind: type, value: Any, lenient: bool) -> Any:
    if lenient and type(value) not in (bool, int, float) and isinstance(value, numbers.Real):
        value = int(value) if isinstance(value, numbers.Integral) else float(value)  # such as numpy's
    if type(value) is int and kind is int:
        return value
    if type(value) is not int and not isinstance(value, float):
        raise _UnfitError
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer that is larger than every float
        is_finite = False
    if not is_finite or (kind is int and not (lenient and value == int(value))):
        raise _UnfitError
    return int(value) if kind is int else value


_TEXTS = {
    bool: ("True or False", "True or False"),
    int: ("an integer", "integers"),
    float: ("a finite number", "finite numbers"),
    str: ("a text", "texts"),
    dict: ("an object with fields", "objects with fields"),
    type(None): ("None", "None"),
    Any: ("any value", "any values"),
}


def _describe(annotation: Any, lenient: bool) -> tuple[str, str]:
    """The values that fit an annotation, in the singular and in the plural."""
    ones, manys = [], []
    listed = "list" if lenient else "tuple"
    for kind, arguments, limits in _parse_all(annotation):
        if kind is tuple and arguments[-1] is Ellipsis:
            one, many = f"a {listed} of {_describe(arguments[0], lenient)[1]}", f"{listed}s"
        elif kind is tuple:
            one, many = f"a {listed} of {len(arguments)} {_describe(arguments[0], lenient)[1]}", f"{listed}s"
        elif kind is dict and arguments:
            one, many = f"an object whose values are {_describe(arguments[1], lenient)[1]}", "objects"
        else:
            one, many = _TEXTS.get(kind, (f"of the type {getattr(kind, '__name__', kind)}",) * 2)
        if any(isinstance(limit, Choice) for limit in limits):
            one = ""
        ones.append(" ".join([one, *map(str, limits)]).strip())
        manys.append(" ".join([many, *map(str, limits)]))
    return " or ".join(ones), " or ".join(manys)
