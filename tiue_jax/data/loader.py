"""An endless stream of training batches. Their order does not depend on the number of processes or threads.

Epoch e is a permutation of all prompts, drawn from (seed, e). The epochs follow each other without a gap. Global batch
number s holds the positions s * batch_size to (s + 1) * batch_size - 1 of this sequence. A batch may contain prompts of
two epochs: all batches are full and no prompt is dropped. A process makes only its rows of each global batch.

The state is the number of batches that were drawn. A run may therefore continue with another number of processes or
threads, and gets the same global batches. grain provides the threads and keeps the position. Its shuffle is not used,
because it is very slow for few prompts.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tiue_jax.data.prompts import PromptSource

Column = Callable[[Sequence[int]], np.ndarray]  # numbers of prompts [b] -> array [b ...]
Tokenize = Callable[[list[str]], np.ndarray]  # prompts [b] -> token ids [b l]

NUM_THREADS = 2  # one reads while the other tokenises. Both release the GIL, so processes would not be faster.
BATCHES_AHEAD = 8


def tokens(prompts: PromptSource, tokenize: Tokenize) -> Column:
    """Returns a column of token ids, int32 [b l].

    Args:
        prompts: the prompts by number.
        tokenize: pads all prompts to one length. Several threads call it at the same time.
    """

    def column(indices: Sequence[int]) -> np.ndarray:
        return np.asarray(tokenize(prompts.read(indices)), np.int32)

    return column


class PromptBatches:
    """An iterator of batches {name: array [b ...]}. Threads make them before the training step needs them.

    Args:
        prompts: the order of the batches depends on the number of prompts, the state on their fingerprint.
        columns: the functions that make the arrays of a batch, by name. Several threads call them at the same time.
        batch_size: rows of the global batch, over all processes.
        seed: the seed of the order, >= 0.
        rows: the rows of each global batch that this process makes, such as sharding.local_rows; None for all.
        num_threads: number of threads; 0 makes each batch when it is drawn.

    Raises:
        ValueError: there is no prompt, or an argument is out of range.
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
        local_rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not local_rows.size or local_rows.min() < 0 or local_rows.max() >= batch_size:
            raise ValueError(f"rows must be some of 0 ... {batch_size - 1}, got {local_rows.tolist()}")
        self._fingerprint = prompts.fingerprint
        steps = grain.MapDataset.source(_Steps(len(prompts), columns, batch_size, seed, local_rows))
        ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=BATCHES_AHEAD if num_threads else 0)
        self._iterator = iter(steps.to_iter_dataset(ahead))

    def __iter__(self) -> "PromptBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position for JSON: the number of batches that were drawn, and the prompts' fingerprint."""
        return {"step": self._iterator.get_state()["next_index"], "prompts": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that `get_state` returned.

        Raises:
            ValueError: the position belongs to other prompts.
        """
        if state.get("prompts") != self._fingerprint:
            raise ValueError(
                "the prompts are not those that the run was started with: expected the fingerprint "
                f"{state.get('prompts')}, got {self._fingerprint}; set data.prompts to the prompts of the run"
            )
        self._iterator.set_state({"next_index": int(state["step"])})


class _Steps:
    """The rows of this process in each global batch, by the number of the batch."""

    def __init__(self, length: int, columns: Mapping[str, Column], batch_size: int, seed: int, rows: np.ndarray):
        self._length, self._columns, self._batch_size, self._seed, self._rows = length, columns, batch_size, seed, rows
        self._orders: dict[int, np.ndarray] = {}  # for at most two epochs, 8 bytes a prompt each
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
                while len(self._orders) > 1:  # keep two: a batch may lie in two epochs
                    del self._orders[min(self._orders)]
                self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._length)
            return self._orders[epoch]
