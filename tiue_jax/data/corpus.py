"""Prompt corpora on disk, for millions of prompts that are read in any order.

A corpus is a dataset of tensorflow-datasets in array_record. It is written and read without TensorFlow. It holds the
prompts in the order of the files that it was made from. `SequentialWriter` keeps this order with little memory; the
builder class of tensorflow-datasets would hold the whole corpus in memory.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tiue_jax import files
from tiue_jax.checked_fields import Range, read
from tiue_jax.data.dataset_folder import DATASET_INFO, METADATA, open_builder
from tiue_jax.data.progress import PromptProgress
from tiue_jax.data.prompts import PathLike, PromptReader, PromptSource, load_prompts
from tiue_jax.weights import hub

NAME, SPLIT, FEATURE = "prompts", "train", "prompt"
PROMPTS_PER_SHARD = 2**17
WRITTEN_AT_ONCE = 2**12


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Fields of metadata.json.

    Attributes:
        fingerprint: a hash of all prompts in their order.
        dropped: the number of texts that were dropped, by reason.
    """

    fingerprint: str
    dropped: dict[str, Annotated[int, Range(0)]]


def open_prompts(path: PathLike, field: str | None = None) -> PromptSource:
    """Opens prompts: those of a file are held in memory, those of a corpus that `write` made stay on disk.

    Args:
        path: a file of text or JSON lines, a corpus folder, or the name of a shipped model that comes with prompts.
        field: the field of the prompt in JSON lines. It is not used for a corpus.

    Raises:
        FileNotFoundError, ValueError: as `PromptReader` or `Corpus`.
    """
    if str(path) in hub.SHIPPED_PROMPTS:
        path = hub.SHIPPED_PROMPTS[str(path)]
    _check_readable([path])
    return Corpus(path) if files.at(path).is_dir() else load_prompts(path, field)


def _check_readable(paths: Sequence[PathLike]) -> None:
    """Raises ValueError for a pipe or a device, whose reading may never end. A missing file is the reader's error."""
    for path in map(files.at, paths):
        if path.exists():
            files.check_readable(path)


def write(paths: Sequence[PathLike], out: PathLike, field: str | None = None, split: str = "train") -> "Corpus":
    """Writes a corpus of all prompts of some files, each prompt once. After an error, `out` does not exist.

    Args:
        paths, field, split: as for `PromptReader`.
        out: a new folder on this disk or in a bucket.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError, ValueError: as `PromptReader`.
        OSError: the folder cannot be written, such as on a full disk.
    """
    import tensorflow_datasets as tfds  # takes a second

    _check_readable(paths)
    reader = PromptReader(paths, field, split)
    with files.writing_folder_aside(out, DATASET_INFO) as folder:
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
            ),
            description="Unique, non-empty, NFC-normalised prompts.",
            features=tfds.features.FeaturesDict({FEATURE: tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )
        writer = tfds.core.SequentialWriter(info, PROMPTS_PER_SHARD, file_format="array_record")
        writer.initialize_splits([SPLIT])
        prompts = iter(reader)
        with PromptProgress() as progress:
            while chunk := [{FEATURE: prompt} for prompt in itertools.islice(prompts, WRITTEN_AT_ONCE)]:
                with files.runtime_errors_as_os_errors(out):
                    writer.add_examples({SPLIT: chunk})
                progress.update(len(chunk))
        sources = [str(path) for path in paths]
        info.metadata.update(
            fingerprint=reader.fingerprint, dropped=reader.dropped, sources=sources, field=field, split=split
        )
        with files.runtime_errors_as_os_errors(out):
            writer.close_all()
    return Corpus(out)


class Corpus:
    """A corpus that `write` made, a `PromptSource`. A corpus in a bucket is copied to this disk while it is open.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: the folder holds another dataset, or a file in it is damaged.
    """

    def __init__(self, folder: PathLike):
        self._folder = files.at(folder)
        if not (self._folder / DATASET_INFO).is_file():
            raise FileNotFoundError(f"{folder}: no {DATASET_INFO} in it, expected a folder that data.prepare made")
        if files.is_remote(self._folder):
            self._copy = tempfile.TemporaryDirectory(prefix="tiue-jax-")
            for file in self._folder.iterdir():
                files.copy(file, Path(self._copy.name) / file.name)
            builder = open_builder(files.at(self._copy.name))
        else:
            builder = open_builder(self._folder)
        found: dict[str, Any] = builder.info.metadata or {}
        if builder.info.name != NAME or "fingerprint" not in found:
            raise ValueError(f"{folder}: holds the dataset {builder.info.name!r}, run data.prepare on it first")
        try:
            metadata = read(Metadata, found)
        except ValueError as error:
            raise ValueError(f"{self._folder / METADATA}: {error}") from error
        self._check(builder)
        self.fingerprint = metadata.fingerprint
        self.dropped = metadata.dropped
        self._records = builder.as_data_source(split=SPLIT)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompts of these numbers, in this order."""
        return [row[FEATURE].decode("utf-8") for row in self._records.__getitems__(indices)]

    def _check(self, builder: Any) -> None:
        """Checks that every file is present and complete, so that training does not fail hours later."""
        from array_record.python.array_record_module import ArrayRecordReader

        if SPLIT not in builder.info.splits or list(builder.info.features) != [FEATURE]:
            raise ValueError(f"{self._folder}: expected the split {SPLIT!r} with the feature {FEATURE!r}")
        split = builder.info.splits[SPLIT]
        for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
            if not path.is_file():
                raise FileNotFoundError(f"{self._folder}: no {path.name} in it")
            try:
                reader = ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError as error:
                raise ValueError(f"{self._folder / path.name}: not a whole array_record file: {error}") from error
            if count != expected:
                raise ValueError(f"{self._folder / path.name}: expected {expected} prompts, got {count}")
