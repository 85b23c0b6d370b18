"""Rows of JSON: JSON Lines, arrays, objects that follow each other, and large objects that hold arrays, such as COCO's.

No file is held in memory. Of arrays and of large objects, an item at a time is.
"""

import codecs
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from tiue_jax.data.fields import USUAL_FIELDS, Bad, Value, spelling
from tiue_jax.data.file_kinds import Opened
from tiue_jax.data.text_rows import bounded_lines

SUFFIXES = (".json", ".jsonl", ".ndjson")
_ONE_A_LINE = (".jsonl", ".ndjson")
_SPACE = " \t\r\n"
_CHUNK = 2**18  # characters
_LARGE = 2**22  # characters: a larger object at the top is read member by member
_DECODER = json.JSONDecoder(parse_int=float)  # int() refuses more than 4,300 digits


def is_json(opened: Opened) -> bool:
    """Returns True for JSON: by how it begins, or by the suffix where any of the first lines is JSON."""
    lines = [line.strip() for line in opened.head.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    if not lines:
        return opened.suffix in SUFFIXES
    together = b"".join(lines[:3])
    rest = together[1:].lstrip()[:1]
    if (together[:1] == b"{" and rest in (b'"', b"}")) or (together[:1] == b"[" and rest in (b"{", b'"', b"[", b"]")):
        return True
    return opened.suffix in SUFFIXES and any(line[:1] in (b"{", b"[", b'"') for line in lines[:5])


def rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields every row of JSON after the number of its line.

    Raises:
        ValueError: an array, or an object of several lines, is not valid JSON. A bad line of JSON Lines is only `Bad`.
    """
    if _is_one_a_line(opened):
        for number, text in bounded_lines(opened.stream):
            yield number, _line(text) if isinstance(text, str) and text else text
        return
    wanted = USUAL_FIELDS if field is None else (field,)
    document = _Document(opened.stream, {spelling(name.split(".")[0]) for name in wanted})
    for number, value in document.rows():
        yield number, _row(value)


def _is_one_a_line(opened: Opened) -> bool:
    lines = opened.head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip().split("\n")
    if lines[0][:1] not in ("{", "["):  # texts, or lines that are damaged
        return True
    if lines[0][:1] == "[":
        return False
    if len(lines) == 1 and not opened.is_whole:  # a line that is longer than the head
        return opened.suffix in _ONE_A_LINE
    if isinstance(_line(lines[0]), dict):
        return True
    return opened.suffix in _ONE_A_LINE and any(isinstance(_line(line), dict) for line in lines[1:3])


def _line(text: str) -> Value:
    try:
        return _row(_DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        return Bad(f"expected a JSON object on every line, got {error}")


def _row(value: Any) -> Value:
    if isinstance(value, (str, dict)):
        return value
    return Bad(f"expected a JSON object or a text, got {type_name(value)}")


def type_name(value: Any) -> str:
    """The name of a value's type in an error: `a number`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}"


class _Document:
    """Values of JSON that follow each other in a stream, read a part at a time."""

    def __init__(self, stream: BinaryIO, wanted: set[str]):
        self._stream, self._wanted = stream, wanted
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._line, self._ended = "", 0, 1, False
        self._more(_CHUNK)
        self._text = self._text.removeprefix("\ufeff")

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yields the values at the top. Instead of an array, and of a large object, those in it."""
        while char := self._next():
            if char == "[":
                yield from self._items()
                continue
            line = self._line
            try:
                value = self._value()
            except _TooLarge:
                yield from self._members()
            else:
                yield line, value

    def _items(self) -> Iterator[tuple[int, Any]]:
        self._expect("[")
        if self._next() == "]":
            return self._advance(1)
        while True:
            self._next()
            line = self._line
            yield line, self._value()
            if self._next() == "]":
                return self._advance(1)
            self._expect(",")

    def _members(self) -> Iterator[tuple[int, Any]]:
        """Yields {name: item} for every item of the arrays that are wanted. Without any, an example of every member."""
        self._expect("{")
        found, example = False, {}
        line = self._line
        while self._next() != "}":
            name = self._value()
            if not isinstance(name, str):
                raise self._error("expected a name in quotes")
            self._next()
            self._expect(":")
            if self._next() == "[":
                items = self._items()
                if spelling(name) in self._wanted:
                    found = True
                    for number, item in items:
                        yield number, {name: item}
                else:
                    example[name] = [item for _, item in itertools.islice(items, 1)]
                    for _ in items:
                        pass
            else:
                example[name] = self._value()
            if self._next() == ",":
                self._advance(1)
            elif self._next() != "}":
                raise self._error("expected , or }")
        self._advance(1)
        if not found:
            yield line, example

    def _next(self) -> str:
        """Skips spaces. Returns the next character, or nothing at the end."""
        while True:
            at = self._at
            while at < len(self._text) and self._text[at] in _SPACE:
                at += 1
            self._advance(at - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more(_CHUNK)

    def _expect(self, char: str) -> None:
        if self._next() != char:
            raise self._error(f"expected {char}")
        self._advance(1)

    def _value(self) -> Any:
        """Reads a value. `_TooLarge` if it is longer than _LARGE characters and the file goes on."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._error("nested too deep") from error
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._error(error.msg) from error
            else:
                if end < len(self._text) or self._ended:  # otherwise a number may go on
                    self._advance(end - self._at)
                    return value
            held = len(self._text) - self._at
            if held > _LARGE:
                raise _TooLarge(str(self._error("no valid JSON, or one value of more than 4,194,304 characters")))
            self._more(max(held, _CHUNK))

    def _advance(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _more(self, count: int) -> None:
        data = self._stream.read(count)
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"line {self._line}: not valid JSON: {problem}")


class _TooLarge(ValueError):
    """A value that is too large to be held."""
