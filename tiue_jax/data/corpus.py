"""Prompt corpora on disk, for millions of prompts that are read in any order.

A corpus is a dataset of tensorflow-datasets in array_record. It is written and read without TensorFlow. It holds the
prompts in the order of the files that it was made from. `SequentialWriter` keeps this order with little memory; the
builder class of tensorflow-datasets would hold the whole corpus in memory.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import weakref
from collections.abc import Sequence
from typing import Annotated, Any

from etils import epath

from tiue_jax import files
from tiue_jax.checked_fields import Range, read
from tiue_jax.data.dataset_folder import DATASET_INFO, METADATA, is_dataset_folder, open_builder
from tiue_jax.data.progress import Progress
from tiue_jax.data.prompt_files import MAX_BAD_SHARE
from tiue_jax.data.prompts import PathLike, PromptReader, PromptSource, load_prompts
from tiue_jax.data.shards import naming_damaged_file
from tiue_jax.temporary import temporary_folder
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


def open_prompts(
    path: PathLike, field: str | None = None, split: str = "train", max_bad_share: float = MAX_BAD_SHARE
) -> PromptSource:
    """Opens prompts: those of files are held in memory, those of a corpus that `write` made stay on disk.

    Args:
        path: a corpus folder, or the name of a shipped model that comes with prompts, or what `PromptReader` takes.
        field: as for `PromptReader`. It is not used for a corpus, like the next two.
        split: as for `PromptReader`.
        max_bad_share: as for `PromptReader`.

    Raises:
        FileNotFoundError, ValueError: as `PromptReader` or `Corpus`.
    """
    if str(path) in hub.SHIPPED_PROMPTS:
        path = hub.SHIPPED_PROMPTS[str(path)]
    folder = files.at(path)
    if folder.is_dir() and is_dataset_folder(folder):
        return Corpus(path)
    return load_prompts(path, field, split, max_bad_share)


def write(
    paths: Sequence[PathLike],
    out: PathLike,
    field: str | None = None,
    split: str = "train",
    max_bad_share: float = MAX_BAD_SHARE,
) -> "Corpus":
    """Writes a corpus of all prompts of some files, each prompt once. After an error, `out` does not exist.

    Args:
        paths: as for `PromptReader`, like the next three.
        field: the field of the prompts.
        split: of a data set.
        max_bad_share: the share of bad rows that may be left out.
        out: a new folder on this disk or in a bucket.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError, ValueError: as `PromptReader`.
        OSError: the folder cannot be written, such as on a full disk.
    """
    import tensorflow_datasets as tfds  # takes a second

    reader = PromptReader(paths, field, split, max_bad_share)
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
        with Progress() as progress:
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
            stack = contextlib.ExitStack()
            copied = stack.enter_context(temporary_folder(tempfile.gettempdir(), "tiue-jax")) / "corpus"
            weakref.finalize(self, stack.close)
            copied.mkdir()
            for file in self._folder.iterdir():
                files.copy(file, copied / file.name)
            builder = open_builder(files.at(copied))
        else:
            builder = open_builder(self._folder)
        found: dict[str, Any] = builder.info.metadata or {}
        if builder.info.name != NAME or not {"fingerprint", "dropped"} <= found.keys():
            raise ValueError(f"{folder}: holds the dataset {builder.info.name!r}, run data.prepare on it first")
        if list(builder.info.features) != [FEATURE]:
            raise ValueError(f"{folder}: expected the feature {FEATURE!r}, got {', '.join(builder.info.features)}")
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
        """Returns the prompts of these numbers, in this order. ValueError if a file is damaged, which is named."""
        with naming_damaged_file(self._shards, indices, self._folder, "run data.prepare again, to a new folder"):
            return [row[FEATURE].decode("utf-8") for row in self._records.__getitems__(indices)]

    def _check(self, builder: Any) -> None:
        """Checks that every file is present and complete, so that training does not fail hours later."""
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            split = builder.info.splits[SPLIT]
            lengths = dict(zip(split.filepaths, split.shard_lengths, strict=True))
        except (KeyError, ValueError) as error:  # from a name of files that makes no sense
            raise ValueError(f"{self._folder / DATASET_INFO}: damaged, it names no prompt files: {error}") from error
        self._shards: dict[epath.Path, range] = {}
        for path, expected in lengths.items():
            if not path.is_file():
                raise FileNotFoundError(f"{self._folder}: no {path.name} in it")
            try:
                reader = ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError as error:
                raise ValueError(f"{self._folder / path.name}: not a whole array_record file: {error}") from error
            start = max((numbers.stop for numbers in self._shards.values()), default=0)
            self._shards[epath.Path(path)] = range(start, start + expected)
            if count != expected:
                raise ValueError(f"{self._folder / path.name}: expected {expected} prompts, got {count}")
