"""A small evaluation of a run's student between two training steps: the same prompts and noise every time."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tiue_jax.data.prompt_files import read_texts
from tiue_jax.data.prompts import PromptSource
from tiue_jax.evaluate import extractors, neighbours, reference, scores
from tiue_jax.evaluate.extractors import Extractor, Features
from tiue_jax.evaluate.generate import noise, prompt_numbers
from tiue_jax.evaluate.pixels import Resize
from tiue_jax.evaluate.reference import Reference
from tiue_jax.models import functional
from tiue_jax.training.preview import StudentSampler
from tiue_jax.training.settings import Settings

_OF_TEXTS = ("clip_score", "retrieval")
_OF_NEIGHBOURS = ("precision", "recall", "density", "coverage", "near_copies")
_OF_FEATURES = ("kid", "cmmd", *_OF_NEIGHBOURS)
_BATCH_SIZE = 8  # images on each device


class Evaluation:
    """Measures a run's student by `train.evaluation_metrics`.

    Each process makes its share of the images on its devices. Process 0 has the metrics.

    Args:
        settings: of the run. `train.evaluation_metrics` is not empty.
        prompts: the prompts of the images in order, see `choose_prompts`.

    Raises:
        FileNotFoundError, ValueError: the extractor or the reference is missing or wrong, or a metric cannot be
            measured with them.
    """

    def __init__(self, settings: Settings, prompts: Sequence[str]):
        train = settings.train
        assert train.evaluation_extractor is not None  # checked by the settings
        self._metrics = train.evaluation_metrics
        distinct = list(dict.fromkeys(prompts))
        numbers = prompt_numbers(train.evaluation_images, train.evaluation_images_per_prompt)
        self._prompts = distinct
        self._numbers = np.array([distinct.index(prompts[number]) for number in numbers])
        self._extractor = extractors.load(train.evaluation_extractor)
        _check(self._metrics, self._extractor, len(numbers), len(distinct))
        self._reference = None
        if train.evaluation_reference is not None and jax.process_index() == 0:
            path = train.evaluation_reference
            if not reference.is_for(path, self._extractor):
                kind = self._extractor.kind
                raise ValueError(f"train.evaluation_reference = {path}: statistics of another extractor than {kind}")
            self._reference = reference.read(path, self._extractor, Resize())
            _check_reference(self._metrics, self._reference, len(numbers))

    def features(self, student: StudentSampler, unet: functional.Params) -> Features:
        """The features of this process's images. It does not communicate.

        Args:
            student: the sampler of this process.
            unet: the student's parameters, numpy arrays.

        Raises:
            FloatingPointError: an image has values that are NaN or infinite.
        """
        mine = share(len(self._numbers), jax.process_index(), jax.process_count())
        made = student(
            unet,
            [self._prompts[number] for number in self._numbers[mine]],
            latents=noise([int(number) for number in mine], student.latents_shape),
            batch_size=_BATCH_SIZE * jax.local_device_count(),
        )
        return self._extractor.image_features(made)

    def gather(self, features: Features) -> Features:
        """The features of all images, from those of each process. All processes must call it."""
        if jax.process_count() == 1:
            return features
        whole = {name: multihost_utils.process_allgather(x, tiled=True) for name, x in features.items()}
        return {name: np.asarray(x)[: len(self._numbers)] for name, x in whole.items()}

    def measure(self, features: Features) -> dict[str, float]:
        """The metrics by their names in a log, such as "eval/clip_score", from the features of all images.

        Raises:
            ValueError: a metric could not be measured; names it.
        """
        found = scores.compute(self._extractor, features, self._prompts, self._numbers, self._reference)
        if missing := [name for name in self._metrics if name not in found.metrics]:
            raise ValueError(f"no {', '.join(missing)}: {'; '.join(found.notes)}")
        return {f"eval/{name}": found.metrics[name].value for name in self._metrics}


def prepare(settings: Settings, prompts: PromptSource) -> Evaluation | None:
    """The evaluation that the settings of a run ask for; None if they ask for none. Errors as Evaluation's."""
    if not settings.train.evaluation_metrics:
        return None
    return Evaluation(settings, choose_prompts(settings, prompts))


def share(count: int, process: int, processes: int) -> np.ndarray:
    """The numbers of the images that a process makes: int [n], n the same for all processes.

    One process after the other, they are 0 to count - 1, and after that copies of the last number.
    """
    each = -(-count // processes)
    return np.minimum(process * each + np.arange(each), count - 1)


def choose_prompts(settings: Settings, prompts: PromptSource) -> list[str]:
    """The prompts of an evaluation: those of `train.evaluation_prompts`, or some of the run's, spread over all.

    Args:
        settings: of the run.
        prompts: of the run.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has too few prompts.
    """
    train = settings.train
    needed = -(-train.evaluation_images // train.evaluation_images_per_prompt)
    if train.evaluation_prompts is None:
        if len(prompts) < needed:
            raise ValueError(f"train.evaluation_images needs {needed} prompts, the run has {len(prompts)}: lower it")
        return prompts.read([int(i) for i in np.linspace(0, len(prompts) - 1, needed)])
    texts = read_texts(Path(train.evaluation_prompts).expanduser())
    if len(texts) < needed:
        raise ValueError(
            f"train.evaluation_images = {train.evaluation_images} needs {needed} prompts, "
            f"{train.evaluation_prompts} has {len(texts)}: lower it, or give more"
        )
    return texts[:needed]


def _check(metrics: Sequence[str], extractor: Extractor, images: int, prompts: int) -> None:
    """Raises ValueError for a metric that this extractor or these images cannot give."""
    for name in metrics:
        needed = None
        if name in _OF_TEXTS and extractor.text_features is None:
            needed = "a CLIP as evaluation_extractor"
        elif name == "retrieval" and prompts < 2:
            needed = "two different prompts"
        elif name == "cmmd" and extractor.kind != "clip":
            needed = "a CLIP as evaluation_extractor"
        elif name == "inception_score" and (extractor.kind != "inception" or images < 10):
            needed = "Inception-v3 as evaluation_extractor, and 10 images"
        if needed:
            got = f"{extractor.kind}, {images} images of {prompts} prompts"
            raise ValueError(f"train.evaluation_metrics: {name} needs {needed}, got {got}")


def _check_reference(metrics: Sequence[str], real: Reference, images: int) -> None:
    """Raises ValueError for a metric that this reference, or this number of images, cannot give."""
    smaller = images if real.features is None else min(images, len(real.features))
    for name in metrics:
        needed = None
        if name in _OF_FEATURES and real.features is None:
            needed = "real images as evaluation_reference, or statistics with their features"
        elif name in _OF_NEIGHBOURS and smaller <= neighbours.K:
            needed = f"more than {neighbours.K} images on both sides"
        elif name == "kid" and smaller < 4:
            needed = "4 images on both sides"
        if needed:
            raise ValueError(f"train.evaluation_metrics: {name} needs {needed}, got {smaller}")
