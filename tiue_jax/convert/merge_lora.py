"""Merges LoRA files into a pipeline: W + scale * alpha / rank * B A (arXiv 2106.09685, eq. 3), in float32.

LoHa, LoKr, DoRA and others change W in another way: see `adapters`.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiue_jax.convert.adapters import Deltas
from tiue_jax.convert.lora_files import read_lora
from tiue_jax.convert.lora_metadata import LORA_PARTS
from tiue_jax.weights import hub
from tiue_jax.weights.names import Params, from_torch, insert, leaves, on_disk, to_torch
from tiue_jax.weights.pipeline_folder import (
    STORED_DTYPES,
    check_pipeline,
    check_writable,
    load_part,
    part_shapes,
    read_configs,
    save_pipeline,
    saved_sampling,
)


def merge_lora(
    model: str | Path,
    lora: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: str = "float32",
    overwrite: bool = False,
) -> int:
    """Writes a pipeline with one or several LoRAs merged into its UNet and its text encoder.

    Args:
        model: a name for hub.resolve.
        lora: one or several names for lora_source.resolve: files, folders or hub repositories.
        out: the folder to write, see pipeline_folder.save_pipeline.
        scale: 1 is the LoRA as it was trained, 0 is the model without it (a DoRA still sets the magnitudes). A sequence
            has one for each LoRA.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Returns:
        The number of weights changed.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite)
    names = [lora] if isinstance(lora, str | Path) else list(lora)
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
    for one in scales:
        if not np.isfinite(one):
            raise ValueError(f"scale must be a finite number, got {one}")
    if len(scales) != len(names):
        raise ValueError(f"expected a scale for each LoRA, got {len(scales)} for {len(names)}")
    folder = hub.resolve(model)
    check_writable(out, overwrite, [folder, *names])
    check_pipeline(folder)
    configs = read_configs(folder)
    shapes = {part: part_shapes(folder, part, configs) for part in LORA_PARTS}
    loras = [read_lora(name, shapes) for name in names]
    sampling = saved_sampling(folder)

    def read(part: str) -> Params:
        of_part = [deltas.get(part, {}) for deltas in loras]
        return apply(load_part(folder, part, configs), list(zip(of_part, scales, strict=True)))

    save_pipeline(
        out,
        unet=(configs.unet, functools.partial(read, "unet")),
        vae=(configs.vae, functools.partial(read, "vae")),
        text_encoder=(configs.text_encoder, functools.partial(read, "text_encoder")),
        tokenizer_dir=folder / "tokenizer",
        schedule=configs.schedule,
        tiue_config=None if sampling is None else sampling.to_dict(),
        dtype=STORED_DTYPES[dtype],
        overwrite=overwrite,
    )
    return len({(part, leaf) for deltas in loras for part, leaves_of_part in deltas.items() for leaf in leaves_of_part})


def apply(params: Params, loras: Sequence[tuple[Deltas, float]]) -> Params:
    """Merges LoRAs, each with its scale, into a parameter tree. Leaves without a change are those of `params`.

    Raises:
        ValueError: a changed weight is not finite; the error names the file of the LoRA and the weight.
    """
    merged: Params = {}
    for path, leaf in leaves(params):
        changes = [(deltas[path], scale) for deltas, scale in loras if path in deltas]
        if changes:
            is_kernel = path[-1] == "kernel"
            base = np.asarray(leaf, np.float32)
            base = base.transpose(to_torch(base.ndim)) if is_kernel else base
            weight = base
            for delta, scale in changes:
                with np.errstate(all="ignore"):  # what is not finite is an error below
                    weight = delta.merge(weight, base, scale)
                if not np.isfinite(weight).all():
                    file = next(iter(delta.tensors.values())).path
                    raise ValueError(f"{file}: values not finite in the LoRA of {on_disk(path)}")
            leaf = (weight.transpose(from_torch(weight.ndim)) if is_kernel else weight).astype(leaf.dtype)
        insert(merged, path, leaf)
    return merged
