"""Measures a pipeline folder on the emoji, with numbers printed and pictures written.

    python examples/emoji/evaluate.py --model emoji --out runs/emoji/evaluation/teacher --json

- retrieval@1: the share of generated pictures whose nearest name, by the tiny CLIP, among the 256 of eval_prompts.txt
  is the one they were made from. Its upper bounds: real pictures, and real pictures through the autoencoder.
- coverage: each concept has two drawings; the share of 32 prompts for which 16 seeds bring both. A picture counts as
  the drawing that is nearer in pixels, over shifts of up to two pixels and, where the concept allows it, mirroring.

Writes retrieval.png (the first 64 prompts) and coverage.png (each row: both drawings, then the 16 seeds) to --out, and
with --json also results.json.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pictures import shift
from train_clip import normalise, tokenize, unit
from transformers import CLIPTokenizer

from tiue_jax import images
from tiue_jax.files import read_text, write_json
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.models.functional import Component
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.weights import hub, model_folder

PROMPTS = Path(__file__).parent / "eval_prompts.txt"
SHIFT = 2  # pixels
EVERY = 8  # of the prompts, one is used for coverage
SEEDS = 16


def from_uint8(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32) / 127.5 - 1


class Judge:
    """The tiny CLIP on a fixed list of names."""

    def __init__(self, folder: Path, names: list[str]):
        cfg = CLIPConfig.from_dict(model_folder.read_config_dict(folder))
        graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
        self._clip = functional.bind(graphdef, model_folder.load(folder, shapes))
        self._image_features = jax.jit(lambda x: self._clip.image_features(normalise(x)))
        self._text = unit(self._clip.text_features(tokenize(CLIPTokenizer.from_pretrained(folder), names)))

    def retrieval(self, pictures: np.ndarray) -> float:
        """Share of uint8 [n h w 3], picture i made from name i, whose nearest name is their own."""
        features = unit(self._image_features(from_uint8(pictures)))
        return float((np.asarray(features @ self._text.T).argmax(1) == np.arange(len(pictures))).mean())


def reconstruct(vae: Component, pictures: np.ndarray) -> np.ndarray:
    """uint8 [n h w 3] through the autoencoder."""

    @jax.jit
    def both(params, x):
        module = vae.bind(params)
        return module.decode(module.encode(x).mean)

    return images.to_uint8(np.asarray(both(vae.params, from_uint8(pictures))))


def nearest_drawing(made: np.ndarray, drawings: np.ndarray, mirrors: bool) -> np.ndarray:
    """Which of drawings [2 h w 3] each of made [n h w 3] is nearest to: int [n]; both in [-1, 1]."""
    poses = [drawings, drawings[:, :, ::-1]] if mirrors else [drawings]
    offsets = range(-SHIFT, SHIFT + 1)
    moved = np.stack([shift(pose, dy, dx) for pose in poses for dy in offsets for dx in offsets], axis=1)
    error = ((made[:, None, None] - moved[None]) ** 2).mean((3, 4, 5))  # [n 2 poses]
    return error.min(2).argmin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", type=Path, default=hub.ASSETS / "emoji-clip")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data.npz"))
    parser.add_argument("--out", type=Path, required=True, help="folder for grids and results.json")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS))
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="also write results.json")
    args = parser.parse_args()

    data = np.load(args.data)
    names = read_text(PROMPTS).split("\n")[:-1]
    where = {name: i for i, name in enumerate(data["prompts"].tolist())}
    concepts = np.array([where[name] for name in names])
    real = data["images"][concepts]  # [n 2 h w 3]
    judge = Judge(args.clip, names)
    pipeline = Pipeline.from_pretrained(args.model)
    options: dict[str, Any] = {
        k: getattr(args, k) for k in ("sampler", "num_inference_steps", "guidance_scale", "seed")
    }
    generate: Callable[..., np.ndarray] = functools.partial(pipeline, batch_size=64, **options)

    generate(names[:64])  # compiles
    start = time.perf_counter()
    made = generate(names)
    seconds = (time.perf_counter() - start) / len(names)
    upper = [(judge.retrieval(x), judge.retrieval(reconstruct(pipeline.vae, x))) for x in (real[:, 0], real[:, 1])]
    results = {
        "model": args.model,
        **pipeline.settings(*(options[k] for k in ("sampler", "num_inference_steps", "guidance_scale"))).to_dict(),
        "seed": args.seed,
        "retrieval": judge.retrieval(made),
        "retrieval_real": (upper[0][0] + upper[1][0]) / 2,
        "retrieval_reconstructed": (upper[0][1] + upper[1][1]) / 2,
        "seconds_per_image": seconds,
    }

    chosen = range(0, len(names), EVERY)
    many = generate([names[i] for i in chosen], num_images_per_prompt=SEEDS).reshape(-1, SEEDS, *made.shape[1:])
    shares = []
    for i, pictures in zip(chosen, many, strict=True):
        drawing = nearest_drawing(from_uint8(pictures), from_uint8(real[i]), bool(data["mirrors"][concepts[i]]))
        shares.append(drawing.mean())
    results["coverage"] = float(np.mean([0 < s < 1 for s in shares]))
    results["rarer_drawing"] = float(np.mean([min(s, 1 - s) for s in shares]))  # 0.5 where both are equally frequent

    for name, value in results.items():
        print(f"{name:24s} {value:.3f}" if isinstance(value, float) else f"{name:24s} {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    images.write_png(args.out / "retrieval.png", images.grid(made[:64], 8, upscale=3))
    rows = np.concatenate([real[::EVERY], many], axis=1).reshape(-1, *made.shape[1:])
    images.write_png(args.out / "coverage.png", images.grid(rows, SEEDS + 2, upscale=2))
    if args.json:
        write_json(args.out / "results.json", results)


if __name__ == "__main__":
    main()
