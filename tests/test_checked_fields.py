"""checked_fields.py: types, ranges and choices of fields, with errors that name field, value and expectation."""

import dataclasses
import json
import math
from typing import Annotated, Any

import numpy as np
import pytest

from tiue_jax.checked_fields import Items, Range, check, check_fields, check_others, one_of, read, shown

Size = Annotated[int, Range(1, 9)]


@dataclasses.dataclass(frozen=True)
class Example:
    """A dataclass with a field of each kind."""

    whole: Size
    number: Annotated[float, Range(0, above_low=True)] = 1.0
    text: Annotated[str, one_of(("a", "b"))] = "a"
    flag: bool = False
    sizes: Size | tuple[Size, ...] | None = None
    two: tuple[Size, Size] = (1, 2)
    few: Annotated[tuple[str, ...], Items(1, 2)] = ("x",)
    named: dict[str, int] = dataclasses.field(default_factory=dict)
    anything: Any = None

    def __post_init__(self):
        check_fields(self, "example")


GOOD = {"whole": 3, "number": 2, "text": "b", "sizes": [1, 9], "two": [3, 4], "few": ["y", "z"], "named": {"k": 7}}


def test_json_is_read_with_its_lists_as_tuples_and_its_whole_numbers_as_ints():
    expected = Example(3, 2, "b", False, (1, 9), (3, 4), ("y", "z"), {"k": 7})
    assert read(Example, GOOD) == expected
    written = json.loads('{"whole": 3.0, "number": 2.0, "sizes": 8.0, "two": [3.0, 4], "named": {}}')
    got = read(Example, written)
    assert got == Example(3, 2.0, sizes=8, two=(3, 4))
    assert type(got.whole) is type(got.sizes) is type(got.two[0]) is int


WRONG = {
    "whole": ["x", "8", None, True, [1], {}, math.nan, math.inf, 1.5, 0, -1, 10, 10**401, 10**5000],
    "number": ["x", None, True, math.nan, math.inf, -math.inf, 0, -1.0, 10**401, 10**5000],
    "text": ["c", None, 1, ["a"], "a" * 1000],
    "flag": ["true", 0, 1, None, []],
    "sizes": ["8", [], [0], [1, None], 1.5, [1.5], True, {}, math.nan],
    "two": [1, [1], [1, 2, 3], [0, 1], None, {}],
    "few": [[], ["a", "b", "c"], "ab", [1], None],
    "named": [[], {"k": "v"}, {"k": None}, {"k": 1.5}, None, 3],
}
WRONG["sizes"].remove([])  # no entry is wrong


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_one_line_with_field_value_and_expectation(field):
    for value in WRONG[field]:
        with pytest.raises(ValueError) as error:
            read(Example, GOOD | {field: value}, "file.json: example")
        message = str(error.value)
        assert message.startswith(f"file.json: example.{field} must be ") and ", got " in message
        assert message.endswith(shown(value)) and "\n" not in message and len(message) <= 400


def test_the_expectations_in_words():
    for name, annotation, value, expected in (
        ("a", Size, 0, "a must be an integer between 1 and 9, got 0"),
        ("b", Size | tuple[Size, Size] | None, "x", "or a list of 2 integers between 1 and 9 or None, got 'x'"),
        ("c", Annotated[float, Range(0, 1, True, True)], 1, "c must be a finite number in (0, 1), got 1"),
        ("d", Annotated[str, one_of("ab")], 3, "d must be among ['a', 'b'], got 3"),
        ("e", dict[str, float], 3, "e must be an object whose values are finite numbers, got 3"),
        ("f", Annotated[tuple[str, ...], Items(1, 3)], [], "f must be a list of texts with 1 to 3 entries, got []"),
        ("g", int, 10**5000, "got a int that is too large to print"),
    ):
        with pytest.raises(ValueError) as error:
            check(name, Annotated[annotation, Range(0, 9)] if name == "g" else annotation, value)
        assert expected in str(error.value)


def test_an_instance_is_checked_strictly():
    for fields in ({"whole": 3.0}, {"whole": 3, "two": [1, 2]}, {"whole": 3, "few": ["x"]}):
        with pytest.raises(ValueError, match=r"^example\.\w+ must be (an integer|a tuple of) "):
            Example(**fields)


def test_arguments_may_be_numbers_of_numpy():
    assert type(check("seed", Size, np.int64(3))) is int and type(check("scale", float, np.float32(2))) is float
    for value in (np.float32(1.5), np.bool_(True), np.array(3), np.nan):
        with pytest.raises(ValueError, match="seed must be an integer"):
            check("seed", Size, value)


@pytest.mark.parametrize("given", [None, [], "x", 3])
def test_something_else_than_an_object(given):
    with pytest.raises(ValueError, match="example must be an object with fields, got "):
        read(Example, given, "example")
    with pytest.raises(ValueError, match="example must be an object with fields, got "):
        check_others(Example, given, "example", {})


def test_other_fields():
    check_others(
        Example,
        {"whole": "x", "act": "silu", "note": 3, "types": ["a"]},
        "e",
        {"act": "silu", "types": ("a",)},
        ["note"],
    )
    with pytest.raises(ValueError, match=r"^e\.act must be 'silu', got 'gelu'$"):
        check_others(Example, {"act": "gelu"}, "e", {"act": "silu"})
    with pytest.raises(ValueError, match=r"^e\.more is not a supported field, got 1$"):
        check_others(Example, {"more": 1}, "e", {})
    with pytest.raises(ValueError, match=r"^e\.whole is missing, expected an integer between 1 and 9$"):
        read(Example, {}, "e")
