"""Rows of CSV and TSV: the texts of one column."""

import codecs
import csv
import re
from collections.abc import Iterator
from typing import Self

from tiue_jax.data.fields import USUAL_FIELDS, Bad, Value, listed, named_column, spelling, usual_field
from tiue_jax.data.file_kinds import Opened, is_binary
from tiue_jax.data.text_rows import MAX_LINE

SUFFIXES = (".csv", ".tsv")
_DELIMITERS = "\t,;|"
_MAX_LINES = 100  # of a row
_SAMPLE = 50  # rows that the delimiter is chosen by
_NAME = re.compile(r"[^\W\d][\w.:-]{0,39}( [\w.:-]{1,20}){0,2}")


def is_csv(opened: Opened) -> bool:
    """Returns True for CSV: by its suffix, or by a first row of names with a usual one, and rows of the same length.

    Prompts often hold commas. So without the suffix the first row must look like names and every row must fit it.
    """
    if is_binary(opened):
        return False
    if opened.suffix in SUFFIXES:
        return True
    for delimiter in _DELIMITERS:
        sample = _sample(opened, delimiter)
        names = sample[0] if sample else []
        usual = any(spelling(name) in USUAL_FIELDS for name in names)
        same = len({len(row) for row in sample}) == 1
        if len(names) > 1 and len(sample) > 1 and usual and same and all(map(_NAME.fullmatch, names)):
            return True
    return False


def rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields the text of the column after the number of the line on which its row begins.

    Args:
        opened: the file.
        field: the column's name, or its number from 1. None for the column with a usual name, or the only one.

    Raises:
        ValueError: there is no such column. The error lists the columns, each with an example.
    """
    delimiter = max(_DELIMITERS, key=lambda each: _fit(_sample(opened, each)))
    sample = _sample(opened, delimiter)
    if not sample:
        return
    first = sample[0]
    has_header = _is_header(first, field)
    names = first if has_header else [str(number + 1) for number in range(len(first))]
    column = _column(names, sample[1 if has_header else 0 :], field)
    lines = _Lines(opened)
    reader = csv.reader(lines, delimiter=delimiter)
    if has_header:
        next(reader)
    while True:
        begins = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begins, Bad(f"expected a row of CSV, got {error}")
            continue
        if lines.ended or reader.line_num - begins >= _MAX_LINES:  # a whole row does not look for a next line
            yield begins, Bad(f"a quote that is not closed: the row has {reader.line_num - begins + 1:,} lines")
        elif not row:
            yield begins, ""
        elif len(row) > len(names):
            yield begins, Bad(f"expected {len(names)} columns, got {len(row)}")
        else:
            yield begins, row[column] if column < len(row) else None


class _Lines:
    """An iterator of the lines as they are, with their ends. A longer line than MAX_LINE bytes comes in parts."""

    def __init__(self, opened: Opened):
        self._stream = opened.stream
        self._first = True
        self.ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE)
        if not line:
            self.ended = True
            raise StopIteration
        if self._first:
            line, self._first = line.removeprefix(codecs.BOM_UTF8), False
        return line.decode("utf-8", "surrogateescape")


def _sample(opened: Opened, delimiter: str) -> list[list[str]]:
    """The first rows, without the last one if the head ends in it."""
    text = opened.head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    found: list[list[str]] = []
    try:
        for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter):
            if row:
                found.append(row)
            if len(found) > _SAMPLE:
                break
    except csv.Error:
        pass
    else:
        if not opened.is_whole and len(found) <= _SAMPLE:
            return found[:-1] or found
    return found[:_SAMPLE]


def _fit(sample: list[list[str]]) -> tuple[float, int]:
    """How well a delimiter fits: the share of rows as long as the first one, if that has two columns; its columns."""
    width = len(sample[0]) if sample else 0
    if width < 2:
        return 0.0, 0
    return sum(len(row) == width for row in sample) / len(sample), width


def _is_header(first: list[str], field: str | None) -> bool:
    spellings = [spelling(name) for name in first]
    if field is not None and spelling(field) in spellings:
        return True
    if any(name in USUAL_FIELDS for name in spellings):
        return True
    return len(first) > 1 and len(set(spellings)) == len(first) and all(map(_NAME.fullmatch, first))


def _column(names: list[str], sample: list[list[str]], field: str | None) -> int:
    example = dict(zip(names, sample[0] if sample else [""] * len(names), strict=False))
    if field is None:
        if len(names) == 1:
            return 0
        field = usual_field(example)
    name = named_column(names, field)
    if name is not None and spelling(name) == spelling(field):
        return names.index(name)
    if field.isdecimal() and 1 <= int(field) <= len(names):
        return int(field) - 1
    raise ValueError(f"no field {field!r}; {listed(example)}")
