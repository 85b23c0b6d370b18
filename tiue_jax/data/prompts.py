"""Training prompts: unique, normalised texts from files and data sets of many formats, see `prompt_files`."""

import dataclasses
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from tiue_jax.data import prompt_files
from tiue_jax.data.prompt_files import MAX_BAD_SHARE

REPEATED = "repeated"

PathLike = str | os.PathLike[str]


class PromptSource(Protocol):
    """Unique prompts with the numbers 0 to len - 1, in memory or on disk. Several threads may read at the same time."""

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts in their order."""

    @property
    def dropped(self) -> dict[str, int]:
        """The number of texts that were dropped when the prompts were read, by reason."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompts of these numbers, in this order.

        Raises:
            IndexError: a number is out of range.
            OSError: the disk cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts in memory, in the order of their file: a `PromptSource`."""

    prompts: list[str]
    dropped: dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompts of these numbers, in this order."""
        return [self.prompts[i] for i in indices]


def load_prompts(
    path: PathLike, field: str | None = None, split: str = "train", max_bad_share: float = MAX_BAD_SHARE
) -> Prompts:
    """Reads all prompts of one path into memory. Arguments and errors are those of `PromptReader`."""
    reader = PromptReader([path], field, split, max_bad_share)
    prompts = list(reader)
    return Prompts(prompts, reader.dropped, reader.fingerprint)


class PromptReader:
    """An iterator of unique, non-empty, NFC-normalised prompts. It reads files once and counts the texts it drops.

    It needs about 0.15 GB of memory for each million prompts, for the hashes that find repeated prompts. Of most
    formats a row at a time is in memory.

    Args:
        paths: files, folders, patterns such as `shards/*.tar`, or names of data sets on the Hugging Face hub. Files
            and folders are on this disk or in a bucket. See `prompt_files.FORMATS` for the formats.
        field: the path to the prompt, or to a list of prompts, with dots: "Task2.Caption" for JourneyDB,
            "captions.text" for coco_captions. Upper and lower case and a colon at the end of a name do not matter,
            since JourneyDB has `Caption`, `Caption:` and `caption`. None for text files, and for files that have one
            of `fields.USUAL_FIELDS`. Rows without the field are dropped and counted.
        split: the split of a folder of tensorflow-datasets, or of a data set on the hub.
        max_bad_share: the share of a path's rows that may be bad, such as a number instead of a text. They are dropped,
            counted, and the first ones are logged with their place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of a known format, or damaged, or too many of its rows are bad, or it has no prompt,
            or `field` or `split` is missing or wrong. The error names the file.
    """

    def __init__(
        self,
        paths: Sequence[PathLike],
        field: str | None = None,
        split: str = "train",
        max_bad_share: float = MAX_BAD_SHARE,
    ):
        if not paths:
            raise ValueError("expected at least one file of prompts, got none")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {max_bad_share}")
        self._sources = [prompt_files.find(path) for path in paths]
        self._field, self._split, self._max_bad_share = field, split, max_bad_share
        self._dropped: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=16)
        have_fields = [source.has_fields for source in self._sources]
        if field is not None and not any(have_fields):
            raise ValueError(f"{paths[0]}: text with a prompt a line has no fields, expected none, got field {field!r}")

    @property
    def dropped(self) -> dict[str, int]:
        """The number of texts that were dropped until now, by reason."""
        return dict(self._dropped)

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts that were read until now, in their order."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[str]:
        seen: set[bytes] = set()
        for source in self._sources:
            for text in source.texts(self._field, self._split, self._max_bad_share, self._dropped):
                prompt = " ".join(unicodedata.normalize("NFC", text).split())
                encoded = prompt.encode("utf-8")
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                if digest in seen:
                    self._dropped[REPEATED] += 1
                    continue
                seen.add(digest)
                self._hash.update(encoded + b"\n")
                yield prompt


def describe(dropped: dict[str, int]) -> str:
    """Returns the numbers of dropped texts for a message, such as ", 3 left out: empty"."""
    return "".join(f", {count:,} left out: {reason}" for reason, count in dropped.items())
