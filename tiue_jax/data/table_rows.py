"""Rows of parquet and of Arrow files, with pyarrow. Only the column of the prompts is read."""

from collections.abc import Iterable, Iterator
from typing import Any

from tiue_jax.data.fields import Value, listed, named_column, usual_field
from tiue_jax.data.file_kinds import Opened

_PARQUET = b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"  # the datasets library writes streams
_ROWS_AT_ONCE = 2**12


def is_parquet(opened: Opened) -> bool:
    """Returns True for parquet, by its first bytes."""
    return opened.head.startswith(_PARQUET)


def is_arrow(opened: Opened) -> bool:
    """Returns True for a file or a stream of Arrow, by its first bytes."""
    return opened.head.startswith((_ARROW_FILE, _ARROW_STREAM))


def parquet_rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields {column: value} of every row after its number, from 1.

    Raises:
        ValueError: the file is damaged, or has no such column. The error lists the columns, each with an example.
    """
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(opened.seekable_stream())

    def example() -> list[Any]:
        return next(iter(file.iter_batches(batch_size=1)), pyarrow.record_batch([])).to_pylist()

    column = _column(file.schema_arrow.names, field, example)
    yield from _rows(column, file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]))


def arrow_rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields {column: value} of every row after its number, from 1. Errors are those of `parquet_rows`."""
    import pyarrow

    def batches() -> tuple[list[str], Iterable[Any]]:
        if opened.head.startswith(_ARROW_STREAM):
            stream = pyarrow.ipc.open_stream(opened.seekable_stream())
            return stream.schema.names, stream
        file = pyarrow.ipc.open_file(opened.seekable_stream())
        return file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))

    names, found = batches()
    found = iter(found)
    first = next(found, None)
    column = _column(names, field, lambda: [] if first is None else first.slice(0, 1).to_pylist())

    def selected() -> Iterator[Any]:
        if first is not None:
            yield first.select([column])
        for batch in found:
            yield batch.select([column])

    yield from _rows(column, selected())


def _column(names: list[str], field: str | None, example: Any) -> str:
    """The name of the column of a field. ValueError if there is none."""
    if field is None:
        try:
            field = usual_field(dict.fromkeys(names, ""))
        except ValueError:
            rows = example()
            usual_field(rows[0] if rows else dict.fromkeys(names))
            raise
    column = named_column(names, field)
    if column is None:
        rows = example()
        raise ValueError(f"no field {field!r}; {listed(rows[0] if rows else dict.fromkeys(names))}")
    return column


def _rows(column: str, batches: Iterable[Any]) -> Iterator[tuple[object, Value]]:
    import pyarrow

    number = 0
    for batch in batches:
        values = batch.column(0)
        if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
            values = values.cast(pyarrow.binary() if pyarrow.types.is_string(values.type) else pyarrow.large_binary())
        for value in values.to_pylist():
            number += 1
            yield number, {column: value}
