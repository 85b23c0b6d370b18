"""The whole sampler as one jax.export artifact: token ids and a seed in, pictures out, without model code to run it.

A folder holds a program for each platform (StableHLO), the weights, the tokenizer, `compiled.json` and `sampler.py`, a
copy of compiled_sampler.py, which runs them. There is one program a platform since jax 0.10 cannot lower TPU kernels,
such as attention's, as a part of one program for several.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save_file

from tiue_jax.convert.compiled_sampler import FORMAT, MANIFEST, PROGRAM, TOKENIZER, WEIGHTS
from tiue_jax.files import check_new_folder, write_json, writing_aside, writing_folder_aside
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import text_to_image

PLATFORMS = ("cpu", "cuda", "tpu")

_LOADER = Path(__file__).with_name("compiled_sampler.py")
_OWN = (MANIFEST, TOKENIZER, WEIGHTS, "sampler.py", *map(PROGRAM.format, PLATFORMS))
_CUDNN = "__cudnn$fmhaSoftmax"  # attention, where a GPU is at hand while exporting; a later jax may not know it
_ONLY_ENCODE = ("vae/encoder/", "vae/quant_conv/")  # where the autoencoder here only decodes


def export_compiled(
    pipe: Pipeline,
    out: str | Path,
    *,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    overwrite: bool = False,
    **sampling: Any,
) -> None:
    """Writes the compiled sampler of a pipeline as a folder, whole or not at all.

    Args:
        pipe: what to compile, in the dtypes of its parameters.
        out: a new folder; or, with `overwrite`, an older one of this kind.
        batch_size: of every call; None for any.
        height, width: of the pictures, in pixels; the UNet's training size by default.
        platforms: among PLATFORMS; none of them needs to be at hand.
        overwrite: replace an older compiled sampler.
        sampling: as `Pipeline.settings`.

    Raises:
        ValueError: naming the argument, its value and what was expected; before any work is done.
        FileExistsError: the folder may not be written.
    """
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms must be among {list(PLATFORMS)}, got {list(platforms)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    latents = pipe.latents_shape(height, width)
    settings = pipe.settings(**sampling)
    check_new_folder(out, MANIFEST, overwrite)

    key = text_to_image.Key.of(settings)
    batch = export.symbolic_shape("b")[0] if batch_size is None else batch_size
    params = {name: getattr(pipe, name).params for name in text_to_image.PARTS}
    weights = {name: leaf for name, leaf in _named(params).items() if not name.startswith(_ONLY_ENCODE)}
    programs = {platform: _export(pipe, key, weights, batch, latents, platform) for platform in platforms}
    manifest = {
        "format": FORMAT,
        "model": pipe.name,
        "sampling": settings.to_dict(),
        "guided": key.guided,
        "guidance_scale": 1.0 if settings.guidance_scale is None else settings.guidance_scale,
        "batch_size": batch_size,
        "height": latents[0] * pipe.vae.cfg.factor,
        "width": latents[1] * pipe.vae.cfg.factor,
        "latents": list(latents),
        "context": pipe.tokenizer.length,
        "pad_token_id": pipe.tokenizer.pad,
        "dtype": {name: jax.tree.leaves(part)[0].dtype.name for name, part in params.items()},
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    with writing_folder_aside(out, MANIFEST, _OWN, overwrite) as new:
        for platform, exported in programs.items():
            (new / PROGRAM.format(platform)).write_bytes(exported.serialize())
        with writing_aside(new / WEIGHTS) as aside:
            save_file({name: np.asarray(leaf) for name, leaf in weights.items()}, aside)
        pipe.tokenizer.backend.save(str(new / TOKENIZER))
        shutil.copyfile(_LOADER, new / "sampler.py")
        write_json(new / MANIFEST, manifest)


def _export(
    pipe: Pipeline,
    key: text_to_image.Key,
    weights: dict[str, Any],
    batch: Any,
    latents: tuple[int, int, int],
    platform: str,
) -> export.Exported:
    """The sampler as a function of flat weights and the fields of program.Batch, lowered for a platform."""
    parts = {name: getattr(pipe, name) for name in text_to_image.PARTS}
    sample = text_to_image.make(parts, pipe.schedule, key, pipe.vae_tiling)
    whole = {name: part.params for name, part in parts.items()}

    def flat(weights: dict[str, jax.Array], *fields: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sample(_tree(whole, weights), text_to_image.Batch(*fields))

    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    fields = text_to_image.Batch(
        ids=of(jnp.int32, batch, pipe.tokenizer.length),
        null_ids=of(jnp.int32, 1, pipe.tokenizer.length),
        prompt_ids=of(jnp.uint32, batch),
        numbers=of(jnp.uint32, batch),
        seed=of(jnp.uint32),
        guidance_scale=of(jnp.float32),
        latents=of(jnp.float32, batch, *latents),
        given=of(jnp.bool_),
    )
    shapes = {name: of(leaf.dtype, *leaf.shape) for name, leaf in weights.items()}
    cudnn = export.DisabledSafetyCheck.custom_call(_CUDNN)
    return export.export(jax.jit(flat), platforms=[platform], disabled_checks=[cudnn])(shapes, *fields)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, as "vae/decoder/conv_in/kernel"."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _tree(shapes: Any, weights: dict[str, jax.Array]) -> Any:
    """The tree of these shapes from weights by path; zeros, with which nothing is computed, where there are none."""
    leaves = [weights.get(name, jnp.zeros(x.shape, x.dtype)) for name, x in _named(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
