"""The networks whose features the metrics compare: one row each in EXTRACTORS, chosen by a folder's `model_type`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tiue_jax import sharding
from tiue_jax.evaluate.pixels import Resize, clean_resize, resize_all
from tiue_jax.models import functional, inception
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.models.dinov2 import Dinov2Config, Dinov2Model
from tiue_jax.models.inception import InceptionV3
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.training.losses import CLIP_MEAN, CLIP_STD
from tiue_jax.weights import clip_vocabulary, hub, model_folder, open_clip
from tiue_jax.weights.tensor_files import StoredTensor, open_file, open_folder

BATCH_SIZE = 64
DINOV2_SIZE = 224
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
INCEPTION_RESIZES = ("clean", "tensorflow")  # clean-fid's, or that of the original graph
SHIPPED_CLIP = "emoji-clip"
Features = dict[str, np.ndarray]  # by name: "features" [n d], and for Inception "logits" [n c]


class Pixels(NamedTuple):
    """The preprocessing of images for the image encoder of a CLIP model."""

    resize: Resize
    mean: np.ndarray  # of red, green and blue in [0, 1]
    std: np.ndarray

    def __str__(self) -> str:
        same = np.array_equal(self.mean, CLIP_MEAN) and np.array_equal(self.std, CLIP_STD)
        values = "of CLIP" if same else f"{self.mean.tolist()} and {self.std.tolist()}"
        return f"centred square, PIL {self.resize.filter} to {self.resize.size}, mean and deviation {values}"


class Extractor(NamedTuple):
    """A network from images to features.

    Attributes:
        kind: "inception", "dinov2" or "clip".
        source: the folder or repository that it was read from.
        sha256: of its weights.
        preprocessing: in words.
        image_features: from uint8 images [n h w 3] to Features.
        text_features: from prompts to float32 [n d] in the space of the image features; None if there are no texts.
    """

    kind: str
    source: str
    sha256: str
    preprocessing: str
    image_features: Callable[[np.ndarray], Features]
    text_features: Callable[[Sequence[str]], np.ndarray] | None = None

    def identity(self) -> dict[str, str]:
        """The facts that two results must share to be compared."""
        return {"kind": self.kind, "sha256": self.sha256, "preprocessing": self.preprocessing}


def load(source: str | Path, inception_resize: str = "clean") -> Extractor:
    """Reads an extractor.

    Args:
        source: "emoji-clip", which is shipped; or a folder or hub repository of a CLIP model or a DINOv2 in
            transformers' layout, of a CLIP model in OpenCLIP's layout, or of what `tiue convert import-inception`
            wrote.
        inception_resize: among INCEPTION_RESIZES, for Inception-v3.

    Raises:
        FileNotFoundError, ValueError: naming the folder, and what is wrong with it.
    """
    folder = hub.ASSETS / SHIPPED_CLIP if str(source) == SHIPPED_CLIP else hub.resolve(source)
    if open_clip.is_chosen({path.name for path in folder.iterdir()}):
        return _open_clip(str(source), folder)
    config = model_folder.read_config_dict(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in EXTRACTORS:
        expected = "clip, dinov2, or inception_v3_fid (written by tiue convert import-inception)"
        raise ValueError(f"{folder}/config.json: model_type must be {expected}, got {kind!r}")
    try:
        return EXTRACTORS[kind](str(source), folder, config, inception_resize)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from error


def _inception(source: str, folder: Path, config: dict[str, Any], resize: str) -> Extractor:
    """Inception-v3 of the FID."""
    if resize not in INCEPTION_RESIZES:
        raise ValueError(f"inception_resize must be among {list(INCEPTION_RESIZES)}, got {resize!r}")
    graphdef, shapes = functional.abstract(InceptionV3)
    params = model_folder.load(folder, shapes)
    network = _sharded(lambda params, x: functional.bind(graphdef, params)(x)._asdict(), params)

    def features(images: np.ndarray) -> Features:
        return network(clean_resize(images, inception.SIZE) if resize == "clean" else images)

    how = {"clean": "PIL bicubic to 299 in float (clean-fid)", "tensorflow": "TensorFlow 1 bilinear to 299"}[resize]
    return Extractor("inception", source, digest_of_weights(folder), how, features)


def _dinov2(source: str, folder: Path, config: dict[str, Any], _: str) -> Extractor:
    """DINOv2 at 224 pixels, as FD-DINOv2 takes it (arXiv 2306.04675)."""
    graphdef, shapes = functional.abstract(Dinov2Model, Dinov2Config.from_dict(config))
    params = model_folder.load(folder, shapes)
    network = _sharded(lambda params, x: {"features": functional.bind(graphdef, params)(x)}, params)
    resize = Resize(DINOV2_SIZE, "bicubic", crop=False)

    def features(images: np.ndarray) -> Features:
        return network(_normalise(resize_all(images, resize), IMAGENET_MEAN, IMAGENET_STD))

    how = f"PIL bicubic to {DINOV2_SIZE}, mean and deviation of ImageNet"
    return Extractor("dinov2", source, digest_of_weights(folder), how, features)


def _clip(source: str, folder: Path, config: dict[str, Any], _: str) -> Extractor:
    """Both towers of a CLIP model in transformers' layout."""
    cfg = CLIPConfig.from_dict(config)
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = model_folder.load(folder, shapes)
    tokenizer = Tokenizer(folder, cfg.text_config.max_position_embeddings)
    resize = Resize(cfg.vision_config.image_size, "bicubic", crop=True)
    return _of_clip(
        source, digest_of_weights(folder), (graphdef, params), tokenizer, Pixels(resize, CLIP_MEAN, CLIP_STD)
    )


def _open_clip(source: str, folder: Path) -> Extractor:
    """Both towers of a CLIP model in OpenCLIP's layout. A folder without a tokenizer has that of OpenAI's CLIP."""
    cfg, preprocessing = open_clip.read_config(folder)
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    params = open_clip.load(folder, shapes)
    sha256 = digest(open_file(folder / open_clip.WEIGHTS))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer_folder = folder if has_tokenizer else clip_vocabulary.tokenizer_folder("sd21")
    tokenizer = Tokenizer(tokenizer_folder, cfg.text_config.max_position_embeddings, cfg.text_config.vocab_size)
    resize = Resize(cfg.vision_config.image_size, preprocessing.interpolation, crop=True)
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    return _of_clip(source, sha256, (graphdef, params), tokenizer, Pixels(resize, mean, std))


def _of_clip(source: str, sha256: str, model: tuple[Any, Any], tokenizer: Tokenizer, pixels: Pixels) -> Extractor:
    """The extractor of a `CLIPModel`, given as its graph and parameters."""
    graphdef, params = model
    images_in = _sharded(lambda params, x: {"features": functional.bind(graphdef, params).image_features(x)}, params)
    texts_in = _sharded(lambda params, ids: {"features": functional.bind(graphdef, params).text_features(ids)}, params)

    def image_features(images: np.ndarray) -> Features:
        return images_in(_normalise(resize_all(images, pixels.resize), pixels.mean, pixels.std))

    def text_features(prompts: Sequence[str]) -> np.ndarray:
        return texts_in(tokenizer(prompts))["features"]

    return Extractor("clip", source, sha256, str(pixels), image_features, text_features)


EXTRACTORS: dict[str, Callable[[str, Path, dict[str, Any], str], Extractor]] = {
    "inception_v3_fid": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
}


def _normalise(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Pixels uint8 [n h w 3] scaled to [0, 1] and normalised: float32."""
    return (images.astype(np.float32) / 255 - mean) / std


def _sharded(function: Callable[[Any, Any], Any], params: Any) -> Callable[[np.ndarray], Features]:
    """The function of a batch, compiled once for BATCH_SIZE rows that are split over the devices of this process."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    placed = jax.device_put(params, sharding.replicated(mesh))
    parts = sharding.batch_parts(mesh)
    batch_size = -(-BATCH_SIZE // parts) * parts
    compiled = jax.jit(function)

    def run(rows: np.ndarray) -> Features:
        results = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
            with jax.set_mesh(mesh):
                out = compiled(placed, jax.device_put(filled, sharding.batch_sharding(mesh)))
            results.append({name: np.asarray(x)[: len(batch)] for name, x in out.items()})
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    return run


def digest_of_weights(folder: Path) -> str:
    """The SHA-256 of the file of a model's weights, or of its index and shards."""
    return digest(open_folder(folder)[1])


def digest(tensors: Mapping[str, StoredTensor]) -> str:
    """The SHA-256 of the file that holds some tensors, or of the hashes of several files."""
    whole = hashlib.sha256()
    for path in sorted({tensor.path for tensor in tensors.values()}):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
