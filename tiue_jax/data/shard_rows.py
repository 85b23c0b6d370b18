"""Captions of webdataset and img2dataset shards: tar files whose members of one name are one sample.

Nothing is extracted. Members that are links are left out. Images are passed over.
"""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from tiue_jax.data.fields import Bad, Value
from tiue_jax.data.file_kinds import Opened

_TEXTS = ("txt", "caption", "text", "prompt")
_OBJECTS = "json"
_LARGEST = 2**22  # bytes of a member
_MAGIC, _MAGIC_AT = b"ustar", 257


def is_tar(opened: Opened) -> bool:
    """Returns True for a tar file, by its first bytes."""
    return opened.head[_MAGIC_AT:].startswith(_MAGIC)


def rows(opened: Opened, field: str | None) -> Iterator[tuple[object, Value]]:
    """Yields the caption of every sample after its name.

    Without a field it is the sample's text (.txt, .caption, .text or .prompt), or otherwise its .json. With a field
    the row holds the fields of the .json, and each text under its suffix.

    Raises:
        ValueError: the file is damaged.
    """
    name = ""
    sample: dict[str, Any] = {}
    try:
        for member, suffix, content in _members(opened):
            if member != name and sample:
                yield name, _row(sample, field)
                sample = {}
            name = member
            sample[suffix] = content
    except tarfile.TarError as error:
        raise ValueError(f"after {name or 'its start'}: not a whole tar file: {error}") from error
    if sample:
        yield name, _row(sample, field)


def _members(opened: Opened) -> Iterator[tuple[str, str, str | Bad]]:
    """Yields name, suffix and text of the members that may hold a caption. A suffix begins at the name's first dot."""
    archive: Any
    with tarfile.open(fileobj=opened.stream, mode="r:" if opened.seekable else "r|") as archive:
        for member in archive:
            archive.members = []  # otherwise the archive keeps one object a member
            folder, slash, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            suffix = suffix.lower()
            if not member.isreg() or suffix not in (*_TEXTS, _OBJECTS):
                continue
            if member.size > _LARGEST:
                yield folder + slash + stem, suffix, Bad(f"expected a text of at most {_LARGEST:,} bytes")
                continue
            data = archive.extractfile(member).read()
            yield folder + slash + stem, suffix, data.decode("utf-8-sig", "surrogateescape")


def _row(sample: dict[str, Any], field: str | None) -> Value:
    texts = [sample[suffix] for suffix in _TEXTS if suffix in sample]
    if field is None and texts:
        return texts[0]
    row: dict[str, Any] = {}
    if _OBJECTS in sample:
        described = sample.pop(_OBJECTS)
        if isinstance(described, Bad):
            return described
        try:
            found = json.loads(described, parse_int=float)
        except (ValueError, RecursionError) as error:
            return Bad(f"expected valid JSON in its .{_OBJECTS}, got {error}")
        row = found if isinstance(found, dict) else {_OBJECTS: found}
    return row | sample
