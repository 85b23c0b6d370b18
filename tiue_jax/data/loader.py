"""The endless stream of training batches, in a global order that does not depend on the number of processes or threads.

Epoch e is a permutation of all prompts, drawn from (seed, e). The epochs follow one another without a gap, and global
batch number s is the positions s * batch_size and on of that sequence: a batch may lie across the border of two epochs,
so that all are full and no prompt is dropped. A process makes only its own rows of every global batch. So the whole
state is the number of batches drawn, and a run may go on with another number of processes or threads: the global
batches stay the same. The threads and the position are grain's. Its shuffle is not used: it is very slow on small sets.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tiue_jax.data.prompts import PromptSource

Column = Callable[[Sequence[int]], np.ndarray]  # numbers of prompts [b] -> one row for each, [b ...]
Tokenize = Callable[[list[str]], np.ndarray]  # prompts [b] -> token ids [b l]

NUM_THREADS = 2  # one reads while one tokenises; both leave Python's lock, so worker processes gain nothing
BATCHES_AHEAD = 8


def tokens(prompts: PromptSource, tokenize: Tokenize) -> Column:
    """The prompts' token ids int32 [b l]; `tokenize` pads to one length, and is called in several threads at once."""
    return lambda indices: np.asarray(tokenize(prompts.read(indices)), np.int32)


class PromptBatches:
    """An iterator of batches, {name: array [b ...]}, made by threads ahead of the step that uses them.

    Args:
        prompts: their number and fingerprint are what the order and the state depend on.
        columns: what a batch holds, by name. Called in several threads at once.
        batch_size: of the global batch.
        seed: of the order.
        rows: which rows of every global batch this process makes, such as sharding.local_rows; all where None.
        num_threads: 0 makes each batch when it is asked for.

    Raises:
        ValueError: no prompt, or a setting out of its range.
    """

    def __init__(
        self,
        prompts: PromptSource,
        columns: Mapping[str, Column],
        batch_size: int,
        seed: int,
        *,
        rows: Sequence[int] | np.ndarray | None = None,
        num_threads: int = NUM_THREADS,
    ):
        if not len(prompts):
            raise ValueError("expected at least one prompt, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        own = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not own.size or own.min() < 0 or own.max() >= batch_size:
            raise ValueError(f"rows must be some of 0 ... {batch_size - 1}, got {own.tolist()}")
        self._fingerprint = prompts.fingerprint
        steps = grain.MapDataset.source(_Steps(len(prompts), columns, batch_size, seed, own))
        ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=BATCHES_AHEAD if num_threads else 0)
        self._iterator = iter(steps.to_iter_dataset(ahead))

    def __iter__(self) -> "PromptBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, to be saved as JSON: how many batches were drawn, and of which prompts."""
        return {"step": self._iterator.get_state()["next_index"], "prompts": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that `get_state` returned. ValueError where it is one among other prompts."""
        if state.get("prompts") != self._fingerprint:
            raise ValueError(
                "the prompts are not those that the run was started with: expected the fingerprint "
                f"{state.get('prompts')}, got {self._fingerprint}"
            )
        self._iterator.set_state({"next_index": int(state["step"])})


class _Steps:
    """This process's part of every global batch, by the batch's number."""

    def __init__(self, length: int, columns: Mapping[str, Column], batch_size: int, seed: int, rows: np.ndarray):
        self._length, self._columns, self._batch_size, self._seed, self._rows = length, columns, batch_size, seed, rows
        self._orders: dict[int, np.ndarray] = {}  # of at most two epochs, 8 bytes a prompt each
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epochs, places = np.divmod(step * self._batch_size + self._rows, self._length)
        indices = np.concatenate([self._permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)]).tolist()
        return {name: column(indices) for name, column in self._columns.items()}

    def _permutation(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) > 1:  # threads near the border are in two epochs at once
                    del self._orders[min(self._orders)]
                self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._length)
            return self._orders[epoch]
