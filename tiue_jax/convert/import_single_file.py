"""Imports a checkpoint in one file, the format of the original repositories and the community, as a pipeline folder."""

from pathlib import Path
from typing import NamedTuple

from tiue_jax.models.vae import VAEConfig
from tiue_jax.weights.pipeline_folder import STORED_DTYPES, check_writable, save_pipeline
from tiue_jax.weights.pipeline_source import find_pipeline


class Imported(NamedTuple):
    """The result of `import_single_file`.

    Attributes:
        kind: the published model that the file looks like, a key of PRESETS; None for a folder.
        notes: facts that the user must know, one line each: evidence that was followed, weights that were chosen, parts
            of the base, tensors that are left over.
    """

    kind: str | None
    notes: tuple[str, ...]


def import_single_file(
    path: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    clip_skip: int = 0,
    prediction_type: str | None = None,
    ema: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Imported:
    """Writes a pipeline folder from a `.safetensors` file, or from a folder or hub repository with a UNet.

    Args:
        path: the file, the folder, or the name of the repository.
        out: the folder to write, see pipeline_folder.save_pipeline.
        base: a model that supplies what the file or folder lacks, see pipeline_source.find_pipeline.
        vae: an autoencoder that takes the place of the model's, see vae_choice.find_vae.
        clip_skip: the number of the last layers of the text encoder that are left out.
        prediction_type: "epsilon" or "v_prediction". None takes what the file says or, if it says nothing, the base's.
            Required for SD 2.x files that say nothing.
        ema: take the UNet's moving average, which full training checkpoints also hold.
        dtype: of the weights on disk, one of STORED_DTYPES.
        overwrite: replace an older pipeline in `out`.

    Raises:
        OSError, ValueError: one line naming the file, tensor or argument that is missing or wrong.
    """
    check_writable(out, overwrite, [name for name in (path, base, vae) if name is not None])
    source = find_pipeline(path, base=base, vae=vae, clip_skip=clip_skip, prediction_type=prediction_type, ema=ema)
    parts = (source.unet, source.vae, source.text_encoder)
    check_writable(out, overwrite, [source.tokenizer, *(part.path for part in parts)])
    if not isinstance(source.vae.cfg, VAEConfig):
        raise ValueError(f"vae must be an AutoencoderKL, which a pipeline folder holds, got a tiny autoencoder: {vae}")
    save_pipeline(
        out,
        unet=(source.unet.cfg, source.unet.read),
        vae=(source.vae.cfg, source.vae.read),
        text_encoder=(source.text_encoder.cfg, source.text_encoder.read),
        tokenizer_dir=source.tokenizer,
        schedule=source.schedule,
        tiue_config=source.sampling.to_dict() if source.has_sampling else None,
        dtype=STORED_DTYPES[dtype],
        overwrite=overwrite,
    )
    return Imported(source.kind, source.notes)
