"""Names the damaged file when records cannot be read from several array_record files. They hold checksums."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath


@contextlib.contextmanager
def naming_damaged_file(
    shards: Mapping[epath.Path, range], indices: Sequence[int], folder: epath.Path, remedy: str
) -> Iterator[None]:
    """Turns the RuntimeError of array_record, as for a changed byte, into one line that names the file.

    Args:
        shards: the numbers of the records in each file.
        indices: the numbers of the records that the block reads.
        folder: is named if every file can be read meanwhile.
        remedy: what to do, for the end of the error.

    Raises:
        ValueError: records cannot be read.
    """
    try:
        yield
    except RuntimeError as error:
        path = _find_damaged(shards, indices) or folder
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: damaged, records cannot be read: {reason}; {remedy}") from error


def _find_damaged(shards: Mapping[epath.Path, range], indices: Sequence[int]) -> epath.Path | None:
    """Returns the first file from which records of these numbers cannot be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path, numbers in shards.items():
        if here := [index - numbers.start for index in indices if index in numbers]:
            try:
                reader = ArrayRecordReader(str(path))
                reader.read(here)
                reader.close()
            except RuntimeError:
                return path
    return None
