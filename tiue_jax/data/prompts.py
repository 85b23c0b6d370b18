"""Prompts to distil on: read from text or JSON lines, and drawn as an endless, resumable stream of token batches."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

JSON_LINES = (".jsonl", ".json", ".ndjson")

Tokenize = Callable[[list[str]], np.ndarray]


class Prompts(NamedTuple):
    """Unique prompts in the order of the file, and how many rows were dropped for which reason."""

    prompts: list[str]
    dropped: dict[str, int]


def load_prompts(path: str | Path, field: str | None = None) -> Prompts:
    """Reads unique, non-empty, NFC-normalised prompts: one a line, or one a JSON object in a .jsonl, .json or .ndjson.

    Args:
        path: a UTF-8 file.
        field: for JSON lines, the path to the prompt with dots, as in JourneyDB's "Task2.Caption". Each name matches
            whatever its case and with or without a colon at its end: JourneyDB spells `Caption`, `Caption:`, `caption`.
            Rows without the field are dropped and counted, as such corpora have some.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file and the line: text that is not UTF-8, a line that is not a JSON object, a prompt
            that is not text; naming the file: no prompt in it, or `field` missing or out of place.
    """
    path = Path(path)
    is_json = path.suffix in JSON_LINES
    if is_json != (field is not None):
        expected = "the prompt's field, such as 'Task2.Caption'" if is_json else f"field None unless it is {JSON_LINES}"
        raise ValueError(f"{path}: expected {expected}, got field {field!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}")
    prompts: dict[str, None] = {}  # an ordered set
    dropped: Counter[str] = Counter()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number).removeprefix("\ufeff").strip()
            if is_json and text:
                found = _field(_object(text, path, number), str(field))
                if found is None:
                    dropped["without the field"] += 1
                    continue
                if not isinstance(found, str):
                    raise ValueError(f"{path}:{number}: expected text in {field!r}, got {type(found).__name__}")
                text = found
            prompt = " ".join(unicodedata.normalize("NFC", text).split())
            if not prompt:
                dropped["empty"] += 1
            elif prompt in prompts:
                dropped["repeated"] += 1
            else:
                prompts[prompt] = None
    if not prompts:
        reasons = ", ".join(f"{count} rows {reason}" for reason, count in dropped.items()) or "it is empty"
        raise ValueError(
            f"{path}: expected at least one prompt{f' in {field!r}' if field else ''}, got none ({reasons})"
        )
    return Prompts(list(prompts), dict(dropped))


class PromptBatches:
    """An endless iterator of token batches: by name, as {"input_ids": int32 [b l]}.

    Every epoch is a permutation of all prompts of its own, drawn from (seed, epoch). Batches cross the border between
    epochs, so that no prompt is dropped and all batches are full. Which prompts a batch holds depends on the seed and
    the batch's number alone: the iterator's whole state is that number.
    """

    def __init__(self, prompts: Sequence[str], tokenizers: Mapping[str, Tokenize], batch_size: int, seed: int):
        """Each tokenizer maps prompts to token ids [b l], padded to one length. Raises ValueError on an empty set."""
        if not prompts:
            raise ValueError("expected at least one prompt, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._prompts = prompts
        self._tokenizers = tokenizers
        self._batch_size = batch_size
        self._seed = seed
        self._step = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> "PromptBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        chosen = [self._prompts[i] for i in self.indices(self._step)]
        self._step += 1
        return {name: np.asarray(tokenize(chosen), np.int32) for name, tokenize in self._tokenizers.items()}

    def indices(self, step: int) -> np.ndarray:
        """Which prompts batch number `step` (from 0) holds, int64 [b]."""
        positions = step * self._batch_size + np.arange(self._batch_size)
        epochs, places = np.divmod(positions, len(self._prompts))
        return np.concatenate([self._permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def get_state(self) -> dict[str, int]:
        """The position, to be saved as JSON: how many batches were drawn."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position that `get_state` returned."""
        self._step = int(state["step"])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self._prompts))
        return self._order


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: expected UTF-8 text, got byte 0x{line[error.start]:02x}") from error


def _object(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: expected a JSON object on every line, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object on every line, got {type(value).__name__}")
    return value


def _field(row: dict[str, Any], field: str) -> Any:
    """The value at a dotted path, None where it is missing; an exact name wins over one in another spelling."""
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict):
            return None
        if name not in value:
            name = next((key for key in value if _plain(key) == _plain(name)), name)
        value = value.get(name)
    return value


def _plain(name: str) -> str:
    return name.strip().removesuffix(":").strip().casefold()
