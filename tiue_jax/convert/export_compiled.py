"""Exports the whole sampler as a program (jax.export): token ids and a seed in, images out, without model code.

The folder holds a program for each platform (StableHLO), the weights, the tokenizer, `compiled.json`, and `sampler.py`,
which runs them: a copy of compiled_sampler.py. Each platform gets its own program, since jax 0.10 cannot lower TPU
kernels, such as attention's, in a program for several platforms.
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

from tiue_jax.convert.compiled_sampler import FORMAT, MANIFEST, PROGRAM, TOKENIZER, WEIGHTS, checksum
from tiue_jax.files import check_new_folder, write_json, writing_aside, writing_folder_aside
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import text_to_image

PLATFORMS = ("cpu", "cuda", "tpu")

_LOADER = Path(__file__).with_name("compiled_sampler.py")
_WRITTEN = (MANIFEST, TOKENIZER, WEIGHTS, "sampler.py", *map(PROGRAM.format, PLATFORMS))
# cuDNN's attention, which an export on a machine with a GPU uses. jax does not promise that later versions know it.
_CUDNN = "__cudnn$fmhaSoftmax"
_ONLY_ENCODE = ("vae/encoder/", "vae/quant_conv/")  # weights that decoding does not use


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
        pipe: the pipeline to compile. It computes in the dtypes of its parameters.
        out: a new folder; or, with `overwrite`, the folder of an older compiled sampler.
        batch_size: of every call; None for any.
        height: of the images, in pixels; the UNet's training size by default.
        width: as `height`.
        platforms: among PLATFORMS. The machine that exports needs none of them.
        overwrite: replace an older compiled sampler.
        sampling: arguments of `Pipeline.settings`.

    Raises:
        ValueError: names the argument, its value and what was expected. Raised before any work is done.
        FileExistsError: the folder may not be written, or it holds the pipeline's folder.
    """
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms must be among {list(PLATFORMS)}, got {list(platforms)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    latents = pipe.latents_shape(height, width)
    settings = pipe.settings(**sampling)
    check_new_folder(out, MANIFEST, overwrite, [pipe.name])

    key = text_to_image.Key.of(settings, pipe.unet.cfg.time_cond_proj_dim is not None)
    batch = export.symbolic_shape("b")[0] if batch_size is None else batch_size
    params = {name: getattr(pipe, name).params for name in text_to_image.PARTS}
    weights = {name: leaf for name, leaf in _named(params).items() if not name.startswith(_ONLY_ENCODE)}
    programs = {platform: _export(pipe, key, weights, batch, latents, platform) for platform in platforms}
    manifest = {
        "format": FORMAT,
        "model": pipe.name,
        "sampling": settings.to_dict(),
        "guided": key.guided,
        "embeds_guidance": pipe.unet.cfg.time_cond_proj_dim is not None,
        "guidance_scale": 1.0 if settings.guidance_scale is None else settings.guidance_scale,
        "batch_size": batch_size,
        "height": latents[0] * pipe.vae.cfg.factor,
        "width": latents[1] * pipe.vae.cfg.factor,
        "latents": list(latents),
        "context": pipe.tokenizer.length,
        "pad_token_id": pipe.tokenizer.pad,
        "tokens_of_several_vectors": {str(token): ids for token, ids in pipe.tokenizer.several.items()},
        "dtype": {name: jax.tree.leaves(part)[0].dtype.name for name, part in params.items()},
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    with writing_folder_aside(out, MANIFEST, _WRITTEN, overwrite, [pipe.name]) as new:
        for platform, exported in programs.items():
            (new / PROGRAM.format(platform)).write_bytes(exported.serialize())
        with writing_aside(new / WEIGHTS) as aside:
            save_file({name: np.asarray(leaf) for name, leaf in weights.items()}, aside)
        pipe.tokenizer.backend.save(str(new / TOKENIZER))
        shutil.copyfile(_LOADER, new / "sampler.py")
        read = (TOKENIZER, WEIGHTS, *map(PROGRAM.format, platforms))
        write_json(new / MANIFEST, manifest | {"crc32": {name: checksum(new / name) for name in read}})


def _export(
    pipe: Pipeline,
    key: text_to_image.Key,
    weights: dict[str, Any],
    batch: Any,
    latents: tuple[int, int, int],
    platform: str,
) -> export.Exported:
    """Lowers the sampler for a platform, as a function of weights by name and of the fields of text_to_image.Batch."""
    parts = {name: getattr(pipe, name) for name in text_to_image.PARTS}
    sample = text_to_image.make(parts, pipe.schedule, key, pipe.vae_tiling)
    whole = {name: part.params for name, part in parts.items()}

    def flat(weights: dict[str, jax.Array], *fields: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sample(_tree(whole, weights), text_to_image.Batch(*fields))

    def of(dtype: Any, *shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    fields = text_to_image.Batch(
        ids=of(jnp.int32, batch, pipe.tokenizer.length),
        null_ids=of(jnp.int32, batch if key.guided else 1, pipe.tokenizer.length),
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
    """The leaves of a tree by path, such as "vae/decoder/conv_in/kernel"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _tree(shapes: Any, weights: dict[str, jax.Array]) -> Any:
    """Builds the tree from weights by path. A leaf without weights is zeros, and no computation uses it."""
    leaves = [weights.get(name, jnp.zeros(x.shape, x.dtype)) for name, x in _named(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
