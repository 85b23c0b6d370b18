"""All metrics of one extractor, from the features of generated and real images."""

from typing import NamedTuple

import numpy as np

from tiue_jax.evaluate import frechet, image_text, kernel_distances, neighbours
from tiue_jax.evaluate.estimate import Estimate, of_mean
from tiue_jax.evaluate.extractors import Extractor, Features
from tiue_jax.evaluate.reference import Reference


class Scores(NamedTuple):
    """The metrics of one extractor.

    Attributes:
        metrics: by name.
        notes: facts that the report must state, one line each.
        cosines: of each image and its prompt, float [n]; None if the extractor reads no texts.
    """

    metrics: dict[str, Estimate]
    notes: tuple[str, ...]
    cosines: np.ndarray | None


def compute(
    extractor: Extractor,
    features: Features,
    prompts: list[str],
    numbers: np.ndarray,
    reference: Reference | None,
    *,
    prompt_prefix: str = "",
    k: int = neighbours.K,
) -> Scores:
    """Computes every metric that the extractor and the reference allow.

    Args:
        extractor: made the features.
        features: of the generated images [n d].
        prompts: the distinct prompts.
        numbers: for each image, the number of its prompt: int [n].
        reference: real images in the same space; None leaves out the metrics that need them.
        prompt_prefix: begins every prompt for the CLIP score.
        k: neighbours of precision, recall, density and coverage.
    """
    x = features["features"]
    metrics: dict[str, Estimate] = {}
    notes: list[str] = []
    cosines = None
    if reference is not None:
        notes += reference.notes
        metrics |= _against_reference(extractor, x, numbers, reference, k, notes)
    if "logits" in features and len(x) >= image_text.INCEPTION_SPLITS:
        metrics["inception_score"] = image_text.inception_score(features["logits"])
    if extractor.text_features is not None:
        texts = extractor.text_features([prompt_prefix + prompt for prompt in prompts])
        cosines = image_text.cosines(x, texts[numbers])
        metrics["clip_score"] = of_mean(cosines, groups=numbers)
        if len(prompts) > 1:
            metrics["retrieval"] = image_text.retrieval(x, texts, numbers)
    if np.bincount(numbers).max() > 1:
        metrics["diversity"] = image_text.diversity(x, numbers)
    return Scores(metrics, tuple(notes), cosines)


def _against_reference(
    extractor: Extractor, x: np.ndarray, numbers: np.ndarray, reference: Reference, k: int, notes: list[str]
) -> dict[str, Estimate]:
    """The metrics that need real images. Adds to `notes` what was left out, and why."""
    needed = frechet.images_needed(x.shape[1])
    if len(x) < needed:
        notes.append(
            f"{extractor.kind}: {len(x)} images are too few for the rank of the covariance of {x.shape[1]} features: "
            f"the Fréchet distance needs {needed} or more and is too large"
        )
    metrics = {"frechet_distance": frechet.estimate(x, reference.statistics, prompts=numbers)}
    real = reference.features
    if real is None:
        notes.append(f"{extractor.kind}: only statistics of the reference are known: no KID, CMMD, precision, recall")
        return metrics
    smaller = min(len(x), len(real))
    size = min(kernel_distances.SUBSET_SIZE, smaller // 2)  # subsets must differ from each other
    if size < 2:
        notes.append(f"{extractor.kind}: KID needs 4 images, got {smaller}")
    elif size < kernel_distances.SUBSET_SIZE:
        notes.append(f"{extractor.kind}: KID with subsets of {size} images, fewer than {kernel_distances.SUBSET_SIZE}")
    if size >= 2:
        metrics["kid"] = kernel_distances.kid(x, real, subset_size=size, prompts=numbers)
    if extractor.kind == "clip":
        metrics["cmmd"] = kernel_distances.cmmd(x, real, prompts=numbers)
    if smaller > k:
        metrics |= neighbours.precision_recall_density_coverage(x, real, k, prompts=numbers)
        metrics["near_copies"] = neighbours.near_copies(x, real, prompts=numbers)
    else:
        notes.append(f"{extractor.kind}: precision and recall with k = {k} need more than {k} images, got {smaller}")
    return metrics
