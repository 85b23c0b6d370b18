"""Measures a pipeline folder on the emoji, with numbers printed and images written.

    python examples/emoji/evaluate.py --model emoji --out runs/emoji/evaluation/teacher --json

The judge is the tiny CLIP. Each measure is also taken of real images, and of real images through the autoencoder.

- retrieval: the share of images whose nearest name, among those of the set, is the one they were made from.
- style: the share of images of prompts with a style whose nearest style, among the four of the concept, is that style.
- coverage: 16 images for each of 32 prompts without a style; the mean share of the concept's styles that are drawn.

The sets of prompts are `plain` (eval_prompts.txt), `styled` (the same with a style that was trained on) and `held_out`
(concepts in a style that no model was trained on). Writes plain.png, styled.png, held_out.png and coverage.png to
--out, and with --json also results.json.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from dataset import Dataset, from_uint8
from styles import STYLES
from texts import styled
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
BATCH = 64
SHOWN = 64  # images of a grid
EVERY = 8  # one of so many prompts is used for coverage
SEEDS = 16


class Pairs(NamedTuple):
    """Concepts in a style, as numbers of the data set: two int arrays [n]."""

    concept: np.ndarray
    style: np.ndarray


class Judge:
    """The tiny CLIP, which names the concept and the style of images."""

    def __init__(self, folder: Path, names: list[str]):
        cfg = CLIPConfig.from_dict(model_folder.read_config_dict(folder))
        graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
        clip = functional.bind(graphdef, model_folder.load(folder, shapes))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        self._image_features = jax.jit(lambda x: unit(clip.image_features(normalise(x))))
        encode = jax.jit(lambda ids: unit(clip.text_features(ids)))
        self._names = np.asarray(encode(tokenize(tokenizer, names)))  # [n d]
        prompts = [[styled(name, style.phrase) for name in names] for style in STYLES]
        self._styled = np.stack([encode(tokenize(tokenizer, row)) for row in prompts], 1)  # [n styles d]

    def _features(self, pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([self._image_features(from_uint8(chunk)) for chunk in in_batches(pixels)])

    def retrieval(self, pixels: np.ndarray, concept: np.ndarray) -> float:
        """Returns the share of uint8 [n h w 3] that are nearest to the name of their concept among all of `concept`."""
        candidates = np.unique(concept)
        nearest = candidates[(self._features(pixels) @ self._names[candidates].T).argmax(1)]
        return float((nearest == concept).mean())

    def styles(self, pixels: np.ndarray, concept: np.ndarray) -> np.ndarray:
        """Returns the nearest style of each of uint8 [n h w 3] among the styled prompts of its concept: int [n]."""
        return np.einsum("nd,nsd->ns", self._features(pixels), self._styled[concept]).argmax(1)


def in_batches(x: np.ndarray) -> list[np.ndarray]:
    """Returns x [n ...] in parts of about BATCH rows."""
    return np.array_split(x, -(-len(x) // BATCH))


def make_reconstruct(vae: Component) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from uint8 images [n h w 3] to the same through the autoencoder."""

    @jax.jit
    def both(params: functional.Params, x: jax.Array) -> jax.Array:
        module = vae.bind(params)
        return module.decode(module.encode(x).mean)

    def reconstruct(pixels: np.ndarray) -> np.ndarray:
        decoded = [np.asarray(both(vae.params, from_uint8(chunk))) for chunk in in_batches(pixels)]
        return images.to_uint8(np.concatenate(decoded))

    return reconstruct


def trained_pairs(data: Dataset, concepts: np.ndarray) -> Pairs:
    """Returns one style for each concept, in turn, of those that were trained on."""
    style = []
    for number, concept in enumerate(concepts):
        known = np.sort(data.style[data.trained[data.concept[data.trained] == concept]])
        style.append(known[number % len(known)])
    return Pairs(concepts, np.array(style))


def coverage(judge: Judge, data: Dataset, made: np.ndarray, concepts: np.ndarray) -> float:
    """Returns the mean share of the trained styles of concepts [n] that occur among their images [n seeds h w 3]."""
    shares = []
    for concept, pixels in zip(concepts, made, strict=True):
        known = set(data.style[data.trained[data.concept[data.trained] == concept]].tolist())
        seen = set(judge.styles(pixels, np.repeat(concept, len(pixels))).tolist())
        shares.append(len(known & seen) / len(known))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", type=Path, default=hub.ASSETS / "emoji-clip")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji"), help="the folder that data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for grids and results.json")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS))
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="also write results.json")
    args = parser.parse_args()

    data = Dataset.load(args.data)
    names = [row[0] for row in data.texts]
    number = {name: i for i, name in enumerate(names)}
    image_of = {(int(c), int(s)): i for i, (c, s) in enumerate(zip(data.concept, data.style, strict=True))}
    concepts = np.array([number[name] for name in read_text(PROMPTS).splitlines()])
    judge = Judge(args.clip, names)
    pipeline = Pipeline.from_pretrained(args.model)
    reconstruct = make_reconstruct(pipeline.vae)
    options: dict[str, Any] = {
        k: getattr(args, k) for k in ("sampler", "num_inference_steps", "guidance_scale", "seed")
    }
    generate: Callable[..., np.ndarray] = functools.partial(pipeline, batch_size=BATCH, **options)
    results: dict[str, Any] = {
        "model": args.model,
        **pipeline.settings(*(options[k] for k in ("sampler", "num_inference_steps", "guidance_scale"))).to_dict(),
        "seed": args.seed,
    }
    args.out.mkdir(parents=True, exist_ok=True)

    seen = trained_pairs(data, concepts)
    unseen = Pairs(*(np.array(x) for x in zip(*data.held_out_pairs(), strict=True)))
    for name, pairs, with_style in (("plain", seen, False), ("styled", seen, True), ("held_out", unseen, True)):
        prompts = [styled(names[c], STYLES[s].phrase) if with_style else names[c] for c, s in zip(*pairs, strict=True)]
        generate(prompts[:BATCH])  # compiles
        start = time.perf_counter()
        made = generate(prompts)
        results["seconds_per_image"] = (time.perf_counter() - start) / len(prompts)
        real = data.pixels[[image_of[int(c), int(s)] for c, s in zip(*pairs, strict=True)]]
        for kind, pixels in (("", made), ("_real", real), ("_reconstructed", reconstruct(real))):
            results[f"{name}_retrieval{kind}"] = judge.retrieval(pixels, pairs.concept)
            if with_style:
                right = judge.styles(pixels, pairs.concept) == pairs.style
                results[f"{name}_style{kind}"] = float(right.mean())
        images.write_png(args.out / f"{name}.png", images.grid(made[:SHOWN], 8))

    chosen = concepts[::EVERY]
    many = generate([names[c] for c in chosen], num_images_per_prompt=SEEDS)
    many = many.reshape(-1, SEEDS, *many.shape[1:])
    results["coverage"] = coverage(judge, data, many, chosen)
    images.write_png(args.out / "coverage.png", images.grid(many.reshape(-1, *many.shape[2:]), SEEDS))

    for name, value in results.items():
        print(f"{name:26s} {value:.3f}" if isinstance(value, float) else f"{name:26s} {value}")
    if args.json:
        write_json(args.out / "results.json", results)


if __name__ == "__main__":
    main()
