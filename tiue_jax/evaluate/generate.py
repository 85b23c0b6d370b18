"""Makes the images of an evaluation chunk by chunk, and goes on where a killed run stopped."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_jax import images
from tiue_jax.data.progress import Progress
from tiue_jax.evaluate.extractors import Extractor, Features
from tiue_jax.evaluate.pixels import Resize, resize_all
from tiue_jax.files import read_json, write_json, writing_aside
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling

logger = logging.getLogger(__name__)

CHUNK = 64  # images that are made, measured and written together; the noise of some samplers depends on it
IDENTITY = "evaluation.json"
_THUMBNAIL = Resize(96, "lanczos")


class Generated(NamedTuple):
    """The images of one point.

    Attributes:
        features: of every extractor, by its name: [n d].
        thumbnails: small images for the report, uint8 [n 96 96 3].
        images_per_second: the median over chunks, without the first of each run, which compiles. None if a run made
            only one chunk.
    """

    features: dict[str, Features]
    thumbnails: np.ndarray
    images_per_second: float | None


def prompt_numbers(num_images: int, num_images_per_prompt: int) -> np.ndarray:
    """For each image, the number of its prompt: int [n]. The images of a prompt are neighbours."""
    return np.arange(num_images) // num_images_per_prompt


def noise(numbers: Sequence[int], shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """The initial latents of images, by their numbers and the seed of the evaluation: float32 [n h w c]."""
    return np.stack([np.random.default_rng((seed, number)).standard_normal(shape, np.float32) for number in numbers])


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Compares the `evaluation.json` of a folder, if it is there, with what this evaluation would write.

    Raises:
        ValueError: the folder holds the images of another evaluation; names the first difference.
    """
    identity = json.loads(json.dumps(identity))
    path = folder / IDENTITY
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: not empty and no {IDENTITY} in it, expected a new folder for --out")
        return
    earlier = read_json(path)
    for name in {**identity, **earlier}:
        if identity.get(name) != earlier.get(name):
            was, now = (str(values.get(name))[:150] for values in (earlier, identity))
            raise ValueError(f"{folder}: an evaluation with {name} {was}, got {now}: give another folder as --out")


def generate(
    pipeline: Pipeline,
    settings: Sampling,
    prompts: Sequence[str],
    numbers: np.ndarray,
    extractors: dict[str, Extractor],
    folder: Path,
    identity: dict[str, Any],
    *,
    resize: Resize,
    height: int | None = None,
    width: int | None = None,
    keep_images: bool = True,
    seed: int = 0,
) -> Generated:
    """Makes the images that are not in the folder yet, and reads the features of all.

    Writes `chunks/00000.npz`, ... with features, each whole or not at all, and `images/000000.png`, ... if
    `keep_images`. A chunk that is there, with its images, is not made again.

    Args:
        pipeline: the model.
        settings: of the sampler, resolved.
        prompts: the distinct prompts.
        numbers: for each image, the number of its prompt: int [n].
        extractors: by name.
        folder: of this point.
        identity: everything that its images and features depend on, see `check_identity`. Written into a new folder.
        resize: of the images before the extractors.
        height: of the images in pixels; None is the model's training size.
        width: as `height`.
        keep_images: also write the images, before `resize`.
        seed: of the noise.

    Raises:
        FloatingPointError: an image has values that are NaN or infinite.
        OSError: a file cannot be written.
    """
    count = len(numbers)
    shape = pipeline.latents_shape(height, width)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, identity)
    (folder / "chunks").mkdir(exist_ok=True)
    if keep_images:
        (folder / "images").mkdir(exist_ok=True)
    chunks, rates = [], []
    made_before = False
    with Progress(count, f"images of {folder.name}") as progress:
        for start in range(0, count, CHUNK):
            path = folder / "chunks" / f"{start // CHUNK:05d}.npz"
            stop = min(start + CHUNK, count)
            pictures = [folder / "images" / f"{number:06d}.png" for number in range(start, stop)]
            chunk = _read_chunk(path, stop - start)
            if keep_images and not all(picture.exists() for picture in pictures):
                chunk = None  # an earlier run kept none
            found = chunk is not None
            if chunk is None:
                begin = time.perf_counter()
                made = pipeline(
                    [prompts[number] for number in numbers[start:stop]],
                    **settings.to_dict(),
                    seed=int(np.random.SeedSequence((seed, start)).generate_state(1)[0]),  # of later noise
                    latents=noise(range(start, stop), shape, seed),
                    height=height,
                    width=width,
                )
                seconds = time.perf_counter() - begin
                chunk = _measure(made, extractors, resize) | {"seconds": np.array(seconds if made_before else np.nan)}
                made_before = True
                if keep_images:
                    for picture, image in zip(pictures, made, strict=True):
                        images.write_png(picture, image)
                with writing_aside(path) as aside, aside.open("wb") as file:
                    np.savez(file, allow_pickle=False, **chunk)
            chunks.append(chunk)
            rates.append((stop - start) / chunk["seconds"])
            progress.update(stop - start, found)
    known = [rate for rate in rates if np.isfinite(rate)]
    features = {
        name: {
            kind: np.concatenate([chunk[f"{name}/{kind}"] for chunk in chunks])
            for kind in ("features", "logits")
            if f"{name}/{kind}" in chunks[0]
        }
        for name in extractors
    }
    thumbnails = np.concatenate([chunk["thumbnails"] for chunk in chunks])
    return Generated(features, thumbnails, float(np.median(known)) if known else None)


def _measure(made: np.ndarray, extractors: dict[str, Extractor], resize: Resize) -> dict[str, np.ndarray]:
    """The arrays of a chunk: features of every extractor, and thumbnails."""
    resized = resize_all(made, resize)
    chunk = {"thumbnails": resize_all(made, _THUMBNAIL)}
    for name, extractor in extractors.items():
        chunk |= {f"{name}/{kind}": x for kind, x in extractor.image_features(resized).items()}
    return chunk


def _read_chunk(path: Path, count: int) -> dict[str, np.ndarray] | None:
    """Reads a chunk of an earlier run. None if it is absent, or damaged, which is logged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            chunk = {name: file[name] for name in file.files}
        if len(chunk["thumbnails"]) != count:
            raise ValueError(f"expected {count} images, got {len(chunk['thumbnails'])}")
    except Exception as error:  # numpy and zipfile raise many types
        logger.warning("%s: damaged, its images are made again: %s", path, error)
        return None
    return chunk
