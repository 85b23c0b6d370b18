"""Rows of text: a prompt a line."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from tiue_jax.data.fields import Bad, Value
from tiue_jax.data.file_kinds import Opened, is_binary

MAX_LINE = 2**20  # bytes


def is_text(opened: Opened) -> bool:
    """Returns True if the content can be text."""
    return not is_binary(opened)


def rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields every line, without the spaces around it, after its number."""
    yield from bounded_lines(opened.stream)


def bounded_lines(stream: BinaryIO) -> Iterator[tuple[int, str | Bad]]:
    """Yields the lines of UTF-8 text, without spaces around them. Bytes that are not UTF-8 become lone surrogates.

    Of a line that is MAX_LINE bytes or longer, only its length is known.
    """
    number = 0
    while line := stream.readline(MAX_LINE):
        number += 1
        length = len(line)
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
            length += len(line)
        if length >= MAX_LINE:
            yield number, Bad(f"expected a line of less than {MAX_LINE:,} bytes, got {length:,}")
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line.decode("utf-8", "surrogateescape").strip()
