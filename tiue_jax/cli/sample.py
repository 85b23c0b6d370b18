"""Prompts in, images out.

    tiue sample --model emoji-tiue --prompt "a red apple" --seed 0 --out apple.png
    tiue sample --model emoji --prompt_file prompts.txt --num_images_per_prompt 4 --out images/
    tiue sample --model emoji --sampler faster_diffusion --prompt "a rocket" --latents noise.npy
    tiue sample --model sd21-base --vae tiny --dtype bfloat16 --prompt "a lighthouse at dusk"

If `--out` ends in .png, it is one image, or a grid of several. Otherwise it is a folder with one file for each image.
The PNG files hold the prompt, the seed, the model and the sampler's settings as text chunks.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from tiue_jax import compile_cache, images
from tiue_jax.checked_fields import Range, check
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, parse, print_error, require
from tiue_jax.data.prompt_files import read_texts
from tiue_jax.models import platforms
from tiue_jax.models.tiling import Tiling
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling import image_metadata
from tiue_jax.sampling.batches import number_images
from tiue_jax.sampling.samplers import SAMPLERS, takers
from tiue_jax.sampling.settings import Sampling, read_key_steps, read_timesteps
from tiue_jax.schedule import SPACINGS
from tiue_jax.weights.pipeline_folder import DTYPES


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    add: dict[str, Any] = {"flag_values": values}
    model = "a shipped model or alias, a folder, a hub repository, or a .safetensors file with a whole model"
    flags.DEFINE_string("model", "emoji-tiue", model, **add)
    base = "a model that supplies what --model lacks, if that is one file or has only a UNet; a name like --model"
    flags.DEFINE_string("base", None, base, **add)
    flags.DEFINE_multi_string("prompt", [], "a description of the image", **add)
    negative = f"what guidance leads away from, for {_names('guidance_scale')}: one for all prompts, or one for each"
    flags.DEFINE_multi_string("negative_prompt", [], negative, **add)
    prompt_file = "text with a prompt a line, or CSV, JSON, parquet and the other formats of `tiue data prepare`"
    flags.DEFINE_string("prompt_file", None, prompt_file, **add)
    flags.DEFINE_string("field", None, "the prompt's field or column in --prompt_file, such as caption", **add)
    flags.DEFINE_string("out", "sample.png", "a .png file (a grid if there are several images), or a folder", **add)
    flags.DEFINE_integer("num_images_per_prompt", 1, "number of images of each prompt", **add)
    flags.DEFINE_integer("seed", 0, "0 to 2^32 - 1", **add)
    latents = ".npy file of initial noise, float32, [n h w c] or PyTorch's [n c h w]; by default from the seed"
    flags.DEFINE_string("latents", None, latents, **add)
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "by default the model's sampler", **add)
    flags.DEFINE_integer(
        "num_inference_steps",
        None,
        "number of steps; for a student K, the number of decoder passes; by default the model's",
        **add,
    )
    flags.DEFINE_float("guidance_scale", None, f"for {_names('guidance_scale')}; up to 1 is no guidance", **add)
    spacing = f"for {_names('timestep_spacing')}; by default the model's spacing"
    flags.DEFINE_enum("timestep_spacing", None, list(SPACINGS), spacing, **add)
    timesteps = f"for {_names('timesteps')}: descending, such as 999,749,499,249, instead of a spacing"
    flags.DEFINE_list("timesteps", None, timesteps, **add)
    keys = f"for {_names('key_steps')}: the steps that run the encoder, such as 0,1,2,5,10; one number n is every n-th"
    flags.DEFINE_list("key_steps", None, keys, **add)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "dtype of the weights and the computation", **add)
    vae = "an autoencoder that replaces the model's: tiny (TAESD), a .safetensors file, or a name like --model"
    flags.DEFINE_string("vae", None, vae, **add)
    clip_skip = "last layers of the text encoder to leave out, as in diffusers: 1 is 'Clip skip 2' of other programs"
    flags.DEFINE_integer("clip_skip", 0, clip_skip, **add)
    flags.DEFINE_enum("vae_dtype", None, list(DTYPES), "dtype of the autoencoder; by default --dtype", **add)
    embedding = "a textual inversion embedding: FILE, TOKEN=FILE, a folder or a hub repository; may be repeated"
    flags.DEFINE_multi_string("embedding", [], embedding, **add)
    flags.DEFINE_bool("vae_tiling", False, "decode large images in tiles, in the memory of one tile", **add)
    tile = "side of a tile in pixels, for --vae_tiling; by default the autoencoder's training size"
    flags.DEFINE_integer("tile_sample_min_size", None, tile, **add)
    overlap = "share of a tile that overlaps the next one, for --vae_tiling; by default 0.25"
    flags.DEFINE_float("tile_overlap_factor", None, overlap, **add)
    flags.DEFINE_integer("batch_size", None, "images in a batch; by default 8", **add)
    step = "number of devices that share the timesteps of one image, for sampler tiue"
    flags.DEFINE_integer("mesh_step", 1, step, **add)
    flags.DEFINE_integer("height", None, "in pixels; by default the model's training size", **add)
    flags.DEFINE_integer("width", None, "in pixels; by default the model's training size", **add)
    columns = "images in a row of the grid; by default num_images_per_prompt, and a square grid if that is 1"
    flags.DEFINE_integer("columns", None, columns, **add)
    flags.DEFINE_integer("upscale", 1, "repeat each pixel this many times in both directions", **add)
    flags.DEFINE_bool("no_compile_cache", False, "compile again, and keep nothing in ~/.cache/tiue_jax/xla", **add)


def run(args: flags.FlagValues) -> None:
    """Makes the images and writes them.

    Raises:
        ValueError, OSError: an argument or a file is wrong. Arguments are checked before the sampling.
        FloatingPointError: an image has values that are NaN or infinite.
    """
    require(args, "out")
    prompts = read_prompts(args.prompt, args.prompt_file, args.field)
    numbered = number_images(prompts, args.num_images_per_prompt, read_negative_prompt(args.negative_prompt))
    out = Path(args.out)
    check_output(out)
    check_size(args, out, len(numbered), (1, 1))  # again below, when the model says how large its images are
    vae_tiling = read_tiling(args)

    if args.no_compile_cache:
        compile_cache.disable()
    else:
        compile_cache.enable()
    pipe = Pipeline.from_pretrained(
        args.model,
        args.dtype,
        base=args.base,
        vae=args.vae,
        clip_skip=args.clip_skip,
        vae_dtype=args.vae_dtype,
        vae_tiling=vae_tiling,
        mesh_step=args.mesh_step,
        embeddings=args.embedding,
    )
    sampling = pipe.settings(
        sampler=args.sampler,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        timestep_spacing=args.timestep_spacing,
        key_steps=read_key_steps(args.key_steps),
        timesteps=read_timesteps(args.timesteps),
    )
    stream = pipe.stream(
        prompts,
        **sampling.to_dict(),
        seed=args.seed,
        num_images_per_prompt=args.num_images_per_prompt,
        batch_size=args.batch_size,
        height=args.height,
        width=args.width,
        latents=None if args.latents is None else read_latents(args.latents, pipe.unet.cfg.in_channels),
        negative_prompt=read_negative_prompt(args.negative_prompt),
    )

    height, width, _ = pipe.latents_shape(args.height, args.width)
    check_size(args, out, len(numbered), (height * pipe.vae.cfg.factor, width * pipe.vae.cfg.factor))
    start = time.perf_counter()
    if out.suffix == ".png":
        made = np.stack(list(_enlarged(stream, args.upscale, len(numbered))))
        image = images.grid(made, _columns(args)) if len(made) > 1 else made[0]
        out.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(out, image, metadata(prompts, args, sampling, args.negative_prompt))
    else:
        out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(_enlarged(stream, args.upscale, len(numbered))):
            image_of = numbered[i]
            about = metadata([image_of.prompt], args, sampling, [image_of.negative_prompt], image_of.number)
            images.write_png(out / f"{i:05d}.png", image, about)
    seconds = time.perf_counter() - start
    print(f"{out}: {len(numbered)} image{'s' * (len(numbered) > 1)} in {seconds:.1f} s, compilation included")


def read_prompts(given: Sequence[str], path: str | None, field: str | None = None) -> list[str]:
    """The prompts of the command line, and then those of the file without the empty ones.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no prompt, or a prompt is not UTF-8, or the file is not of a known format.
    """
    _check_utf8("prompt", given)
    prompts = [*given, *(read_texts(path, field) if path is not None else [])]
    if not prompts:
        raise ValueError("no prompt: expected --prompt or --prompt_file")
    return prompts


def read_negative_prompt(given: Sequence[str]) -> str | list[str] | None:
    """The negative prompt of the command line: one text for all prompts, a list with one for each, or None.

    Raises:
        ValueError: a text is not UTF-8.
    """
    _check_utf8("negative_prompt", given)
    return list(given) if len(given) > 1 else next(iter(given), None)


def _check_utf8(name: str, texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python could not decode the command line
            raise ValueError(f"{name} must be UTF-8 text, got {os.fsencode(text)!r}") from error


def check_size(args: flags.FlagValues, out: Path, count: int, size: tuple[int, int]) -> None:
    """Raises ValueError if what is written at once, a grid or one image, does not fit into memory.

    Args:
        args: the command's flags.
        out: the file or folder to write.
        count: the number of images.
        size: height and width of an image in pixels.
    """
    check("columns", Annotated[int, Range(1)] | None, args.columns)  # also where there is no grid
    is_grid = out.suffix == ".png" and count > 1
    images.grid_size((count if is_grid else 1, *size), _columns(args) if is_grid else 1, upscale=args.upscale)


def _columns(args: flags.FlagValues) -> int | None:
    """The images in a row of the grid. None for a square grid."""
    if args.columns is None and args.num_images_per_prompt > 1:
        return args.num_images_per_prompt
    return args.columns


def read_tiling(args: flags.FlagValues) -> Tiling | None:
    """The tiles of the autoencoder's decoder. None without --vae_tiling.

    Raises:
        ValueError: a flag of tiles without --vae_tiling, or a value out of range.
    """
    given = {name: getattr(args, name) for name in ("tile_sample_min_size", "tile_overlap_factor")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.vae_tiling:
        return Tiling(**given)
    for name, value in given.items():
        raise ValueError(f"{name} is for --vae_tiling, got {value} without")
    return None


def read_latents(path: str, channels: int) -> np.ndarray:
    """Reads latents from a .npy file that holds [n h w c], or [n c h w] as PyTorch does. Returns [n h w c].

    Args:
        path: the file.
        channels: c, which tells the two layouts apart.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold latents, or both layouts are possible; names the file.
    """
    try:
        latents = np.lib.format.open_memmap(path, mode="r")  # does not unpickle, and does not allocate memory
    except OSError:
        raise
    except Exception as error:  # numpy raises many types for a broken header
        raise ValueError(f"{path}: expected a whole .npy file of numbers: {error}") from error
    shape = " ".join(map(str, latents.shape))
    if latents.ndim != 4 or channels not in (latents.shape[1], latents.shape[3]):
        expected = f"latents [n h w {channels}] or PyTorch's [n {channels} h w]"
        raise ValueError(f"{path}: expected {expected}, got [{shape}]")
    if latents.shape[1] == latents.shape[3]:
        raise ValueError(f"{path}: [{shape}] may be [n h w c] or [n c h w]: use Pipeline in Python instead")
    return np.asarray(latents if latents.shape[3] == channels else latents.transpose(0, 2, 3, 1))


def check_output(out: Path) -> None:
    """Raises OSError or ValueError if `out` cannot be written. Creates nothing."""
    if out.suffix == ".png" and out.is_dir():
        raise IsADirectoryError(f"{out}: cannot write: a folder, expected a .png file")
    if out.suffix not in ("", ".png") and not out.is_dir():
        raise ValueError(f"out must end in .png or be a folder, got {str(out)!r}")
    folder = out.absolute().parent if out.suffix == ".png" else out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{out}: cannot write: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK) or (out.is_file() and not os.access(out, os.W_OK)):
        raise PermissionError(f"{out}: cannot write: no permission")


def metadata(
    prompts: list[str],
    args: flags.FlagValues,
    settings: Sampling,
    negative_prompts: Sequence[str] = (),
    number: int | None = None,
) -> dict[str, Any]:
    """The text chunks of a PNG file: the prompts and settings that it was made with.

    Args:
        prompts: of the file's images; one a line in the result.
        args: the command's flags.
        settings: of the sampler.
        negative_prompts: of the file's images, or one for all; one a line in the result.
        number: of the image among those of its prompt. None for a grid.
    """
    others = {}
    for name in ("base", "latents", "vae", "vae_dtype", "tile_sample_min_size", "tile_overlap_factor"):
        value = getattr(args, name)
        if value is not None:
            others[name] = value
    if args.embedding:
        others["embedding"] = "\n".join(args.embedding)
    if args.clip_skip:
        others["clip_skip"] = args.clip_skip
    if args.vae_tiling:
        others["vae_tiling"] = True
    if args.upscale > 1:
        others["upscale"] = args.upscale
    return image_metadata.describe(
        prompts,
        seed=args.seed,
        model=args.model,
        settings=settings,
        dtype=args.dtype,
        negative_prompts=negative_prompts,
        others=others,
        number=number,
        num_images_per_prompt=args.num_images_per_prompt,
    )


def _enlarged(stream: Iterable[np.ndarray], upscale: int, total: int) -> Iterator[np.ndarray]:
    """The images of all batches one by one, enlarged; shows a progress bar if there are several."""
    with tqdm(total=total, unit="image", disable=total == 1) as progress:
        for batch in stream:
            for image in images.enlarge(batch, upscale):
                yield image
                progress.update()


def _names(setting: str) -> str:
    """The samplers that take a setting, for a help text."""
    return ", ".join(takers(setting))


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, 2 after an error of one line on stderr, or 130 after Ctrl-C."""
    platforms.leave_out_missing_tpu()
    try:
        args = parse(argv, define_flags, __doc__)
        if args is not None:
            run(args)
    except (ValueError, OSError, FloatingPointError, flags.Error) as error:
        print_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
