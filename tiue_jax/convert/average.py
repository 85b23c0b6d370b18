"""Averages students that were distilled from one teacher, as SwiftBrush v2 does (arXiv 2408.14176, section 4.4)."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tiue_jax.convert.export import export_pipeline
from tiue_jax.models.functional import Params
from tiue_jax.models.presets import Configs
from tiue_jax.weights import hub
from tiue_jax.weights.pipeline_folder import check_pipeline, check_writable, load_part, load_sampling, read_configs


def average(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a pipeline whose UNet is the weighted mean of those of several. All other parts are the first one's.

    Args:
        models: at least two names for hub.resolve. Their UNets must have one configuration, and students among them
            the same timesteps.
        out: the folder to write, see pipeline_folder.save_pipeline.
        weights: one for each model, finite, whose sum is not 0; they are divided by their sum. None is the plain mean.
            A negative weight moves away from a model.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Raises:
        OSError, ValueError: one line naming the model, the argument or the config field that is wrong.
    """
    if len(models) < 2:
        raise ValueError(f"an average needs at least 2 models, got {len(models)}: give --model once for each")
    shares = list(weights) or [1.0] * len(models)
    if len(shares) != len(models):
        raise ValueError(f"expected a weight for each of {len(models)} models, got {len(shares)}")
    total = math.fsum(shares)
    if not all(map(math.isfinite, shares)) or total == 0:
        raise ValueError(f"weights must be finite numbers whose sum is not 0, got {', '.join(map(str, shares))}")
    check_writable(out, overwrite)
    folders = [hub.resolve(model) for model in models]
    check_writable(out, overwrite, folders)
    for folder in folders:
        check_pipeline(folder)
    first = _compared(folders[0])
    for folder in folders[1:]:
        for what, theirs in _compared(folder).items():
            mine = first[what]
            if changed := next((name for name in mine if mine[name] != theirs[name]), None):
                found = f"{changed} {str(theirs[changed])[:80]}, but {str(mine[changed])[:80]} in {folders[0]}"
                raise ValueError(
                    f"{folder}, {what}: {found}: only models of one architecture, schedule and K are averaged"
                )
    shares = [share / total for share in shares]
    export_pipeline(models[0], out, unet=functools.partial(_mean, folders, shares), dtype=dtype, overwrite=overwrite)


def _compared(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts that all models must share: the fields of the configurations, and the timesteps of a student."""
    configs = read_configs(folder)
    return {"unet": vars(configs.unet), "schedule": vars(configs.schedule), "student": _student(folder, configs)}


def _student(folder: Path, configs: Configs) -> dict[str, Any]:
    """The timesteps at which a student was distilled; None for another model, which has no steps of its own."""
    sampling = load_sampling(folder, configs.unet)
    if sampling.sampler != "tiue":
        return {"timesteps": None}
    resolved = sampling.resolve(configs.schedule)
    assert resolved.num_inference_steps is not None
    return {"timesteps": resolved.respaced(configs.schedule).timesteps(resolved.num_inference_steps).tolist()}


def _mean(folders: Sequence[Path], shares: Sequence[float]) -> Params:
    """The weighted mean of the UNets in pipeline folders, float32. Two UNets are in memory at a time."""

    def add(sum_so_far: np.ndarray, x: np.ndarray, share: float) -> np.ndarray:
        sum_so_far += share * x.astype(np.float64)
        return sum_so_far

    total = None
    for folder, share in zip(folders, shares, strict=True):
        params = load_part(folder, "unet", read_configs(folder))
        if total is None:
            total = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), params)
        total = jax.tree.map(functools.partial(add, share=share), total, params)
    assert total is not None
    return jax.tree.map(lambda x: x.astype(np.float32), total)
