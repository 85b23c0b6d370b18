"""An evaluation from prompts to `results.json`: one point for each model and guidance scale."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tiue_jax.evaluate import extractors, reference, scores
from tiue_jax.evaluate.generate import Generated, check_identity, generate, prompt_numbers
from tiue_jax.evaluate.protocols import Protocol
from tiue_jax.files import write_json
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.weights import fingerprint, hub

RESULTS = "results.json"


class Model(NamedTuple):
    """A model to evaluate.

    Attributes:
        name: as Pipeline.from_pretrained takes it.
        label: its short name in the report.
        source: the name that the user gave.
    """

    name: str
    label: str
    source: str


@dataclasses.dataclass(frozen=True)
class Point:
    """One model with one setting, measured.

    Attributes:
        entry: of `results.json`.
        generated: its images and features.
        numbers: for each image, the number of its prompt: int [n].
        cosines: of each image and its prompt, float [n], by the first extractor that reads texts; None if none does.
    """

    entry: dict[str, Any]
    generated: Generated
    numbers: np.ndarray
    cosines: np.ndarray | None


def evaluate(
    models: Sequence[Model],
    prompts: Sequence[str],
    out: str | Path,
    *,
    protocol: Protocol,
    extractor_sources: Sequence[str] = (extractors.SHIPPED_CLIP,),
    reference_path: str | Path | None = None,
    reference_split: str = "validation",
    guidance_scales: Sequence[float] = (),
    sampling: dict[str, Any] | None = None,
    dtype: str = "float32",
    keep_images: bool = True,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Point]]:
    """Makes images of the prompts with every model and guidance scale, measures them, and writes `results.json`.

    A run that was killed goes on where it stopped, when it is called with the same arguments again.

    Args:
        models: at least one.
        prompts: in the order of the images. A repeated prompt counts as one.
        out: a new folder, or that of an earlier call with the same arguments.
        protocol: the choices that change a metric.
        extractor_sources: as extractors.load takes them.
        reference_path: real images, as reference.read takes them. None leaves out the metrics that need them.
        reference_split: of a reference that is a data set.
        guidance_scales: one point for each; none is the model's guidance scale.
        sampling: settings of `Pipeline.settings` that differ from the model's.
        dtype: "float32" or "bfloat16", of the models.
        keep_images: also write the images.
        seed: of the noise of all images, 0 or more.

    Returns:
        The content of `results.json`, and the points with their images.

    Raises:
        ValueError, FileNotFoundError: an argument is wrong, or `out` holds another evaluation. Raised before any image
            is made.
        FloatingPointError: an image has values that are NaN or infinite.
    """
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {seed}")
    out = Path(out)
    count = len(prompts) * protocol.num_images_per_prompt if protocol.num_images is None else protocol.num_images
    needed = -(-count // protocol.num_images_per_prompt)
    if len(prompts) < needed:
        raise ValueError(f"{count} images need {needed} prompts, got {len(prompts)}: give more, or lower --num_images")
    used = list(prompts[:needed])
    distinct = list(dict.fromkeys(used))
    number_of = {prompt: number for number, prompt in enumerate(distinct)}
    order = np.array([number_of[prompt] for prompt in used])
    numbers = order[prompt_numbers(count, protocol.num_images_per_prompt)]

    loaded = load_extractors(extractor_sources, protocol)
    real: dict[str, reference.Reference | None] = {name: None for name in loaded}
    if reference_path is not None:
        for name, extractor in loaded.items():
            if reference.is_for(reference_path, extractor):
                real[name] = reference.read(reference_path, extractor, protocol.reference_resize, reference_split)
        if not any(real.values()):
            kinds = ", ".join(extractor.kind for extractor in loaded.values())
            raise ValueError(
                f"{reference_path}: statistics of another extractor than {kinds}: give it with --extractor"
            )

    about: dict[str, Any] = {
        "protocol": protocol.to_dict(),
        "prompts": {"count": len(used), "distinct": len(distinct), "sha256": _hash(used)},
        "num_images": count,
        "seed": seed,
        "reference": None if reference_path is None else Path(reference_path).name,
        "reference_sha256": next((found.sha256 for found in real.values() if found is not None), None),
        "extractors": {name: extractor.identity() for name, extractor in loaded.items()},
    }
    # What the images and their features depend on. Metrics may be added to images that are there.
    made_from = {name: about[name] for name in ("prompts", "num_images", "seed", "extractors")}
    sizes = ("num_images_per_prompt", "height", "width", "resize")
    made_from |= {name: about["protocol"][name] for name in sizes}
    made_from |= {"dtype": dtype}

    def plan(model: Model, pipeline: Pipeline) -> list[tuple[str, Sampling, Path, dict[str, Any]]]:
        """The label, the settings, the folder and the identity of each point of a model."""
        parts = fingerprint.of_pipeline(hub.resolve(model.name, dtype))
        pipeline.latents_shape(protocol.height, protocol.width)
        points = []
        for scale in guidance_scales or (None,):
            settings = pipeline.settings(**((sampling or {}) | ({} if scale is None else {"guidance_scale": scale})))
            label = model.label if scale is None else f"{model.label}, guidance {scale:g}"
            folder = out / label.replace(", guidance ", "-guidance-").replace("/", "--")
            identity = made_from | {f"model's {part}": digest for part, digest in parts.items()}
            points.append((label, settings, folder, identity | {"sampling": settings.to_dict()}))
            check_identity(folder, points[-1][-1])
        return points

    for model in models[1:]:  # the first is checked below; not all models may fit in memory together
        plan(model, Pipeline.from_pretrained(model.name, dtype))
    points = []
    for model in models:
        pipeline = Pipeline.from_pretrained(model.name, dtype)
        digest = extractors.digest_of_weights(hub.resolve(model.name, dtype) / "unet")
        for label, settings, folder, identity in plan(model, pipeline):
            made = generate(
                pipeline,
                settings,
                distinct,
                numbers,
                loaded,
                folder,
                identity,
                resize=protocol.resize,
                height=protocol.height,
                width=protocol.width,
                keep_images=keep_images,
                seed=seed,
            )
            points.append(_point(model, label, digest, settings, made, distinct, numbers, loaded, real, protocol))
    results = about | {
        "points": [point.entry for point in points],
        "dtype": dtype,
        "environment": environment(),
    }
    write_json(out / RESULTS, results)
    return results, points


def load_extractors(sources: Sequence[str], protocol: Protocol) -> dict[str, extractors.Extractor]:
    """Loads extractors by their names in results: the kind, with a number if there are several of one kind."""
    loaded: dict[str, extractors.Extractor] = {}
    for source in sources:
        extractor = extractors.load(source, protocol.inception_resize)
        alike = sum(other.kind == extractor.kind for other in loaded.values())
        loaded[f"{extractor.kind}-{alike + 1}" if alike else extractor.kind] = extractor
    return loaded


def _point(
    model: Model,
    label: str,
    digest: str,
    settings: Sampling,
    made: Generated,
    prompts: list[str],
    numbers: np.ndarray,
    loaded: dict[str, extractors.Extractor],
    real: dict[str, reference.Reference | None],
    protocol: Protocol,
) -> Point:
    """Measures the images of one point."""
    metrics: dict[str, Any] = {}
    notes: list[str] = []
    cosines = None
    for name, extractor in loaded.items():
        found = scores.compute(
            extractor,
            made.features[name],
            prompts,
            numbers,
            real[name],
            prompt_prefix=protocol.prompt_prefix,
            k=protocol.k,
        )
        metrics[name] = {metric: estimate.to_dict() for metric, estimate in found.metrics.items()}
        notes += found.notes
        cosines = found.cosines if cosines is None else cosines
    entry = {
        "label": label,
        "model": model.source,
        "unet_sha256": digest,
        "sampling": settings.to_dict(),
        "images_per_second": made.images_per_second,
        "metrics": metrics,
        "notes": notes,
    }
    return Point(entry, made, numbers, cosines)


def environment() -> dict[str, Any]:
    """The versions and the devices that results were made with."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "pillow")}
    devices = jax.local_devices()
    return {
        "python": platform.python_version(),
        **versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "machine": platform.processor() or platform.machine(),
    }


def _hash(prompts: Sequence[str]) -> str:
    """The SHA-256 of prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
