"""What a run shows while it runs: TensorBoard scalars and pictures, and its settings as config.json. Process 0 only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

from tiue_jax.files import write_json
from tiue_jax.images import write_png


class MetricsWriter:
    """Writes below a run's folder: `tensorboard/`, `samples/` and `config.json`; a context manager that flushes.

    On every process but the first it writes nothing, so that callers need not ask which one they are.
    """

    def __init__(self, workdir: str | Path, start_step: int = 0):
        """`start_step` hides what an earlier, interrupted run logged after the checkpoint that this one resumes."""
        self._workdir = Path(workdir)
        self._writer = None
        if jax.process_index() == 0:
            self._workdir.mkdir(parents=True, exist_ok=True)
            purge = start_step + 1 if start_step else None
            self._writer = SummaryWriter(logdir=str(self._workdir / "tensorboard"), purge_step=purge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def config(self, settings: Mapping[str, Any]) -> None:
        """The run's settings, as `config.json` and as text in TensorBoard."""
        if self._writer is not None:
            write_json(self._workdir / "config.json", dict(settings))
            self._writer.add_text("config", f"```json\n{json.dumps(dict(settings), indent=2)}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag, such as `train/loss_vsd`, after `step` updates."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, float(value), step)

    def flush(self) -> None:
        """Writes to the disk what was only noted."""
        if self._writer is not None:
            self._writer.flush()

    def image(
        self, step: int, tag: str, image: np.ndarray, metadata: Mapping[str, object] | None = None
    ) -> Path | None:
        """A picture, uint8 [h w 3], as `samples/{tag}_{step}.png` and in TensorBoard; the file's path."""
        if self._writer is None:
            return None
        path = self._workdir / "samples" / f"{tag.replace('/', '_')}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, image, metadata)
        self._writer.add_image(tag, image, step, dataformats="HWC")
        self._writer.flush()
        return path
