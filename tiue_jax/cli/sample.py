"""Prompts in, pictures out.

    tiue sample --model emoji-tiue --prompt "a red apple" --seed 0 --out apple.png
    tiue sample --model emoji --prompt_file prompts.txt --num_images_per_prompt 4 --out pictures/
    tiue sample --model emoji --sampler faster_diffusion --prompt "a rocket" --latents noise.npy
    tiue sample --model sd21-base --vae tiny --dtype bfloat16 --prompt "a lighthouse at dusk"

`--out` ending in .png gets one picture, a grid where there are several; anything else is a folder that gets one file
for each picture. The PNG files carry how they were made as text chunks.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from tiue_jax import compile_cache, images
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, parse, print_error
from tiue_jax.files import read_text
from tiue_jax.models.tiling import Tiling
from tiue_jax.pipeline import Pipeline, number_images
from tiue_jax.sampling.settings import SAMPLERS, Sampling, read_key_steps
from tiue_jax.schedule import SPACINGS
from tiue_jax.weights.pipeline_folder import DTYPES


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("model", "emoji-tiue", "shipped model or alias, folder, or hub repository", **add)
    flags.DEFINE_multi_string("prompt", [], "what to draw; may be repeated", **add)
    flags.DEFINE_string("prompt_file", None, "UTF-8 text file with one prompt a line", **add)
    flags.DEFINE_string("out", "sample.png", "a .png file (several pictures: a grid), or a folder", **add)
    flags.DEFINE_integer("num_images_per_prompt", 1, "pictures of each prompt", **add)
    flags.DEFINE_integer("seed", 0, "0 to 2^32 - 1", **add)
    flags.DEFINE_string("latents", None, ".npy file of initial noise, float32 [n h w c] or torch's [n c h w]", **add)
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "the model's own by default", **add)
    flags.DEFINE_integer("num_inference_steps", None, "K of the student; the model's own by default", **add)
    flags.DEFINE_float("guidance_scale", None, "for ddim, lcm and faster_diffusion; 1 is no guidance", **add)
    flags.DEFINE_enum("timestep_spacing", None, list(SPACINGS), "the model's own by default", **add)
    keys = "for faster_diffusion: the steps that run the encoder, as 0,1,2,5,10; one number n is every n-th"
    flags.DEFINE_list("key_steps", None, keys, **add)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of weights and computation", **add)
    flags.DEFINE_string("vae", None, "another autoencoder than the model's: tiny (TAESD), or as --model", **add)
    flags.DEFINE_enum("vae_dtype", None, list(DTYPES), "of the autoencoder; --dtype by default", **add)
    flags.DEFINE_bool("vae_tiling", False, "decode large pictures in tiles, in the memory of one tile", **add)
    flags.DEFINE_integer(
        "tile_sample_min_size", None, "side of a tile in pixels; the autoencoder's own by default", **add
    )
    flags.DEFINE_float("tile_overlap_factor", None, "of a tile, shared with its neighbour; 0.25 by default", **add)
    flags.DEFINE_integer("batch_size", None, "pictures at a time, 8 by default", **add)
    steps = "devices that share the timesteps of a picture, for the student; others take other pictures"
    flags.DEFINE_integer("mesh_step", 1, steps, **add)
    flags.DEFINE_integer("height", None, "in pixels; the model's own by default", **add)
    flags.DEFINE_integer("width", None, "in pixels; the model's own by default", **add)
    flags.DEFINE_integer("columns", None, "of the grid; num_images_per_prompt, or a square, by default", **add)
    flags.DEFINE_integer("upscale", 1, "repeat each pixel so many times in both directions", **add)
    flags.DEFINE_bool("no_compile_cache", False, "compile anew, and keep nothing in ~/.cache/tiue_jax/xla", **add)


def run(args: flags.FlagValues) -> None:
    """Makes the pictures and writes them. ValueError or OSError, in one line, on anything wrong with the arguments."""
    # Everything that can be wrong is found before the sampling, which may take long.
    prompts = read_prompts(args.prompt, args.prompt_file)
    out = Path(args.out)
    check_output(out)
    for name in ("columns", "upscale"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")

    how_decoded = {"vae": args.vae, "vae_dtype": args.vae_dtype, "vae_tiling": read_tiling(args)}
    (compile_cache.disable if args.no_compile_cache else compile_cache.enable)()
    pipe = Pipeline.from_pretrained(args.model, args.dtype, mesh_step=args.mesh_step, **how_decoded)
    given = lambda *names: {name: getattr(args, name) for name in names}
    how = given("sampler", "num_inference_steps", "guidance_scale", "timestep_spacing")
    how["key_steps"] = read_key_steps(args.key_steps)
    latents = None if args.latents is None else read_latents(args.latents, pipe.unet.cfg.in_channels)
    what = given("seed", "num_images_per_prompt", "batch_size", "height", "width")
    stream = pipe.stream(prompts, latents=latents, **how, **what)

    each = args.num_images_per_prompt
    drawn = number_images(prompts, each)
    single = out.suffix != ".png"
    if single:
        out.mkdir(parents=True, exist_ok=True)
    start, made = time.perf_counter(), []
    with tqdm(total=len(drawn), unit="image", disable=len(drawn) == 1) as progress:
        for batch in stream:
            for picture in images.enlarge(batch, args.upscale):
                if single:
                    prompt, number = drawn[progress.n]
                    about = metadata([prompt], args, pipe.settings(**how), number)
                    images.write_png(out / f"{progress.n:05d}.png", picture, about)
                else:
                    made.append(picture)
                progress.update()
    seconds = time.perf_counter() - start
    if not single:
        columns = args.columns or (each if each > 1 else None)
        whole = images.grid(np.stack(made), columns) if len(made) > 1 else made[0]
        out.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(out, whole, metadata(prompts, args, pipe.settings(**how)))
    print(f"{out}: {len(drawn)} image{'s' * (len(drawn) > 1)} in {seconds:.1f} s, compilation included")


def read_prompts(given: Sequence[str], path: str | None) -> list[str]:
    """The prompts of the command line, then the lines of the file, all but empty ones.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no prompt, or one is not UTF-8.
    """
    for prompt in given:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that Python could not decode
            raise ValueError(f"prompt must be UTF-8 text, got {os.fsencode(prompt)!r}") from error
    lines = read_text(path).splitlines() if path is not None else []
    lines = [line for line in map(str.strip, lines) if line]
    if path is not None and not lines:
        raise ValueError(f"{path}: expected at least one prompt")
    prompts = [*given, *lines]
    if not prompts:
        raise ValueError("nothing to draw: expected --prompt or --prompt_file")
    return prompts


def read_tiling(args: flags.FlagValues) -> Tiling | None:
    """How the autoencoder's decoding is cut, None for one piece. ValueError where a setting of tiles is for nothing."""
    given = {name: getattr(args, name) for name in ("tile_sample_min_size", "tile_overlap_factor")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.vae_tiling:
        raise ValueError(
            f"{' and '.join(given)} is for --vae_tiling, got {', '.join(map(str, given.values()))} without"
        )
    return Tiling(**given) if args.vae_tiling else None


def read_latents(path: str, channels: int) -> np.ndarray:
    """Latents [n h w c] of a .npy file that holds them so or as PyTorch does, [n c h w]: `channels` says which.

    Raises:
        FileNotFoundError, ValueError: naming the file, where it is none of the two, or could be both.
    """
    try:
        latents = np.lib.format.open_memmap(path, mode="r")  # unpickles nothing, allocates nothing a header promises
    except OSError:
        raise
    except Exception as error:  # on broken headers numpy raises what Python's own tokenizer and parser do
        raise ValueError(f"{path}: expected a whole .npy file of numbers: {error}") from error
    shape = " ".join(map(str, latents.shape))
    if latents.ndim != 4 or channels not in (latents.shape[1], latents.shape[3]):
        expected = f"latents [n h w {channels}] or PyTorch's [n {channels} h w]"
        raise ValueError(f"{path}: expected {expected}, got [{shape}]")
    if latents.shape[1] == latents.shape[3]:
        raise ValueError(f"{path}: [{shape}] may be [n h w c] and [n c h w]: give it to Pipeline in Python instead")
    return np.asarray(latents if latents.shape[3] == channels else latents.transpose(0, 2, 3, 1))


def check_output(out: Path) -> None:
    """Raises OSError or ValueError where `out` cannot be written, creating nothing."""
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
    prompts: list[str], args: flags.FlagValues, settings: Sampling, number: int | None = None
) -> dict[str, Any]:
    """What a PNG file says about how it was made; a grid's prompts are one a line."""
    about = {"prompt": "\n".join(prompts), "seed": args.seed, "model": args.model, **settings.to_dict()}
    which = {"num_images_per_prompt": args.num_images_per_prompt} if number is None else {"image_number": number}
    about |= {} if args.latents is None else {"latents": args.latents}
    decoded = ("vae", "vae_dtype", "tile_sample_min_size", "tile_overlap_factor")
    about |= {name: getattr(args, name) for name in decoded if getattr(args, name) is not None}
    about |= {"vae_tiling": True} if args.vae_tiling else {}
    about |= {"upscale": args.upscale} if args.upscale > 1 else {}
    return about | which | {"dtype": args.dtype, "software": "tiue-jax"}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, 2 after one line on stderr about what was wrong, or 130 after Ctrl-C."""
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
