"""CLIP's tokenizer as one function from prompts to token ids. Several threads may call it at the same time."""

import dataclasses
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from tiue_jax.checked_fields import Range, check, read, shown
from tiue_jax.files import read_json
from tiue_jax.models import plain_tokenizer
from tiue_jax.temporary import temporary_folder

TokenId = Annotated[int, Range(0, 2**31 - 1)]

# All files that a tokenizer is read from. Other files of its folder are not opened, so the same list is downloaded.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

logger = logging.getLogger(__name__)

MAX_SHOWN = 200  # characters of a prompt in a warning


class Tokenizer:
    """The CLIPTokenizer in a folder.

    It calls the Rust part of transformers' tokenizer directly. The Python part is slower, and it is not safe with
    threads: it sets padding and truncation at every call.

    A token of a textual inversion embedding with several vectors stands for several ids, as in diffusers
    (`maybe_convert_prompt`): with `<cat>`, `<cat>_1` and `<cat>_2` among the added tokens, `<cat>` is read as all
    three.

    Attributes:
        several: the ids that such a token stands for, by the token's id.

    Args:
        folder: contains tokenizer.json, or vocab.json and merges.txt.
        length: number of tokens in the text encoder's context. If the tokenizer has a lower limit, that is used.
        vocab_size: number of tokens that the text encoder knows. None if no text encoder reads the token ids.

    Raises:
        FileNotFoundError: the folder has none of these files.
        ValueError: a file is damaged, transformers cannot read the tokenizer, or it has tokens that the text encoder
            does not know.
    """

    def __init__(self, folder: str | Path, length: int, vocab_size: int | None = None):
        folder = Path(folder)
        tokenizer = _load_plain(folder) or load(folder)
        self.length = min(int(tokenizer.model_max_length), length)  # which a file may give as 8.0
        self.pad = check(f"{folder}: the id of the pad_token", TokenId, tokenizer.pad_token_id)
        self.backend = tokenizer.backend_tokenizer
        _check_known(folder, self.backend, vocab_size)
        self.backend.no_truncation()  # tokenizer.json may have set both
        self.backend.no_padding()
        self.several = tokens_of_several_vectors(tokenizer.added_tokens_encoder)
        self._read = self._cut = 0
        self._counting = threading.Lock()

    @property
    def cut_share(self) -> float:
        """The share of the prompts until now that were too long and were cut, 0 to 1."""
        return self._cut / max(self._read, 1)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts to token ids int32 [b l], padded. Logs a warning for each prompt that is too long and is cut."""
        cut_here = 0
        padded = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt, encoding in zip(padded, prompts, self.backend.encode_batch_fast(list(prompts)), strict=True):
            ids = expanded(encoding.ids, self.several)
            if len(ids) > self.length:
                cut = self.backend.decode(ids[self.length - 1 : -1]).replace(plain_tokenizer.END_OF_WORD, " ").strip()
                shown, ignored = _shortened(prompt), _shortened(cut)
                logger.warning("prompt %s is longer than %d tokens, ignored: %s", shown, self.length, ignored)
                cut_here += 1
                ids = ids[: self.length - 1] + ids[-1:]  # the last token is the end of text
            row[: len(ids)] = ids
        with self._counting:
            self._read += len(prompts)
            self._cut += cut_here
        return padded


def tokens_of_several_vectors(added: Mapping[str, int]) -> dict[int, list[int]]:
    """The ids that a token stands for, by its id, for the tokens that stand for several.

    Args:
        added: the ids of the tokens that were added to the vocabulary.
    """
    several = {}
    for token, number in added.items():
        ids = [number]
        while (next_id := added.get(f"{token}_{len(ids)}")) is not None:
            ids.append(next_id)
        if len(ids) > 1:
            several[number] = ids
    return several


def expanded(ids: list[int], several: Mapping[int, list[int]]) -> list[int]:
    """Token ids with each id in `several` replaced by the ids that it stands for."""
    return [one for number in ids for one in several.get(number, (number,))] if several else ids


def _shortened(text: str) -> str:
    """The repr of a text, of which at most MAX_SHOWN characters are shown."""
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r}..."


def _check_known(folder: Path, backend: Any, vocab_size: int | None) -> None:
    """Raises ValueError if a tokenizer has tokens that a text encoder with `vocab_size` tokens does not know."""
    if vocab_size is None:
        return
    tokens = backend.get_vocab(with_added_tokens=True)
    if unknown := sorted((number, token) for token, number in tokens.items() if number >= vocab_size):
        number, token = unknown[0]
        raise ValueError(
            f"{folder}: the tokenizer does not fit the text encoder, whose vocab_size is {vocab_size}: expected token "
            f"ids below it, got {number} for {shown(token)} and {len(unknown) - 1} more"
        )


_Token = str | dict | None  # a text, or the text and how it is matched


@dataclasses.dataclass(frozen=True)
class _TokenizerConfig:
    """Fields of tokenizer_config.json and special_tokens_map.json that a tokenizer's work depends on."""

    model_max_length: Annotated[int, Range(2)] | None = None  # the first and last token are always there
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    additional_special_tokens: tuple[_Token, ...] | dict | None = None
    added_tokens_decoder: dict[str, dict] | None = None
    add_prefix_space: bool | None = None


def _check_files(folder: Path) -> None:
    """Raises ValueError, naming the file, for a JSON file of a tokenizer that is damaged."""
    found = {name: read_json(folder / name) for name in TOKENIZER_FILES if _is_json(folder / name)}
    for name, content in found.items():
        try:
            if name in ("vocab.json", "added_tokens.json"):
                _check_ids(content)
            elif name in ("tokenizer_config.json", "special_tokens_map.json"):
                read(_TokenizerConfig, content)
        except ValueError as error:
            raise ValueError(f"{folder / name}: {error}") from error


def _check_ids(ids: dict[str, Any]) -> None:
    """Raises ValueError for a token whose id is no number. There may be 50,000, so only a wrong one is described."""
    for token, number in ids.items():
        if type(number) is not int or number < 0:
            check(f"the id of token {shown(token)}", TokenId, number)


def _is_json(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def _load_plain(folder: Path) -> plain_tokenizer.PlainTokenizer | None:
    """The CLIPTokenizer without transformers. None if its files are unusual, or damaged: `load` says what is wrong."""
    try:
        tokenizer = plain_tokenizer.read(folder)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.encode("a photo")
            _check_files(folder)
        return tokenizer
    except Exception:  # the parsers in Rust raise plain Exceptions
        return None


def load(folder: Path) -> Any:
    """The CLIPTokenizer of transformers. Errors as Tokenizer."""
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"{folder}: no tokenizer.json or vocab.json, expected the files of a CLIPTokenizer")
    _check_files(folder)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that PyTorch is not installed
    from transformers import CLIPTokenizer  # here, since the import takes seconds

    with temporary_folder(tempfile.gettempdir(), "tiue-jax") as aside:
        for name in TOKENIZER_FILES:  # transformers sees no other file
            if (folder / name).is_file():
                shutil.copyfile(folder / name, aside / name)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(aside)
            tokenizer.backend_tokenizer.encode("a photo")  # some parts of a tokenizer fail only when they are used
            return tokenizer
        except BaseException as error:  # on broken files its parsers, in Rust and Python, raise plain Exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
                raise
            reason = " ".join(str(error).replace(str(aside), str(folder)).split())
            raise ValueError(f"{folder}: transformers cannot read this tokenizer: {reason[:300]}") from error
