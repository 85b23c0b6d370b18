"""Trains a tiny CLIP on the emoji: {out}/clip (transformers format). Its text encoder is the pipeline's.

    python examples/emoji/train_clip.py --out runs/emoji --steps 2000 --image_steps 3000

First both towers, contrastive over batches of concepts in two styles each: every image against the names of the
concepts and against the prompts with a style. Then, with the text tower fixed, so that the UNet can be trained on it
meanwhile, the image tower and the projections against the names of all concepts and the four styles of the concept.
Images are mirrored, shifted, blurred, recoloured and made noisy, so that the model also judges generated ones. It
prints the retrieval of the right name among all, and of the right style among the styles.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dataset import Dataset, augment
from styles import SIZE, STYLES
from texts import pick, row_in_style, rows_of
from training import State, create, make_step, muon, train
from transformers import CLIPTokenizer

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from tiue_jax.weights import model_folder

CONCEPTS = 64  # of a batch, each in two styles
IMAGES = 128  # of a batch of the second stage
LEARNING_RATE = 1e-3
PROJECTION = 128
SHIFT = 4  # pixels
SHOWN = 512  # images that a report measures, of those that were trained on
BLUR = 2  # pixels each way
# OpenAI's values, so that the preprocessing is the same for the tiny model and for the original ones.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Metrics = dict[str, jax.Array]


def make_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Returns the configuration of both towers for a tokenizer."""
    return CLIPConfig(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=PROJECTION,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            projection_dim=PROJECTION,
        ),
        projection_dim=PROJECTION,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Returns token ids int32 [b l], padded to the context."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"].astype(np.int32)


def normalise(x: jax.Array) -> jax.Array:
    """Returns images [b h w 3] in [-1, 1] as CLIP's pixel values."""
    return ((x + 1) / 2 - MEAN[None, None, None]) / STD[None, None, None]


def degrade(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns images [b h w 3] in [-1, 1] with random blur, contrast, tint and noise, drawn for each image."""
    b, h, w, _ = x.shape
    keys = jax.random.split(key, 5)
    offsets = range(2 * BLUR + 1)
    padded = jnp.pad(x, ((0, 0), (BLUR, BLUR), (BLUR, BLUR), (0, 0)), mode="edge")
    rows = sum((padded[:, dy : dy + h] for dy in offsets), jnp.float32(0)) / len(offsets)
    blurred = sum((rows[:, :, dx : dx + w] for dx in offsets), jnp.float32(0)) / len(offsets)
    x = x + jax.random.uniform(keys[0], (b, 1, 1, 1), maxval=0.8) * (blurred - x)
    contrast = jax.random.uniform(keys[1], (b, 1, 1, 1), minval=0.8, maxval=1.2)
    x = contrast * x + 0.08 * jax.random.normal(keys[2], (b, 1, 1, 3))
    strength = jax.random.uniform(keys[3], (b, 1, 1, 1), maxval=0.15)
    return jnp.clip(x + strength * jax.random.normal(keys[4], x.shape), -1, 1)


def unit(x: jax.Array | np.ndarray) -> jax.Array:
    """Returns vectors [... d] divided by their lengths."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def contrast_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns the cross-entropy of logits [n m] in both directions: row i belongs to column label[i]."""
    right = logits[jnp.arange(len(label)), label]
    to_text = (jax.nn.logsumexp(logits, axis=1) - right).mean()
    to_image = (jax.nn.logsumexp(logits, axis=0)[label] - right).mean()
    return (to_text + to_image) / 2


def make_loss(graphdef: Any) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns the loss of the first stage. Image i of a batch shows name i // 2 and styled prompt i."""

    def loss_fn(params: functional.Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        pixels, tokens = batch  # [2n h w 3]; n names, then 2n styled prompts: [3n l]
        clip = functional.bind(graphdef, params)
        image = unit(clip.image_features(normalise(degrade(pixels, key))))
        text = unit(clip.text_features(tokens))
        scale = jnp.exp(jnp.minimum(clip.logit_scale[...], jnp.log(100.0)))
        logits = scale * image @ text.T  # [2n 3n]
        count = len(image)
        names, styled = jnp.split(logits, [count // 2], axis=1)
        name, prompt = jnp.arange(count) // 2, jnp.arange(count)
        metrics = {"name": (names.argmax(1) == name).mean(), "prompt": (styled.argmax(1) == prompt).mean()}
        loss = (contrast_loss(names, name) + contrast_loss(styled, prompt)) / 2
        return loss, {**metrics, "scale": scale}

    return loss_fn


def make_image_loss(graphdef: Any, text_model: functional.Params) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns the loss of the second stage, with the names of all concepts as candidates and `text_model` fixed."""

    def loss_fn(params: functional.Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        # Images [b h w 3], concepts [b], styles [b], text states at the end of text: [n d] and [b styles d].
        pixels, concept, style, names, styled = batch
        clip = functional.bind(graphdef, {**params, "text_model": text_model})
        image = unit(clip.image_features(normalise(degrade(pixels, key))))
        scale = jnp.exp(jnp.minimum(clip.logit_scale[...], jnp.log(100.0)))
        to_name = scale * image @ unit(clip.text_projection(names)).T  # [b n]
        to_style = scale * jnp.einsum("bd,bsd->bs", image, unit(clip.text_projection(styled)))
        losses, metrics = [], {}
        for name, logits, label in (("name", to_name, concept), ("style", to_style, style)):
            right = logits[jnp.arange(len(label)), label]
            losses.append((jax.nn.logsumexp(logits, axis=1) - right).mean())
            metrics[name] = (logits.argmax(1) == label).mean()
        return losses[0] + losses[1], metrics

    return loss_fn


def make_retrieval(graphdef: Any, data: Dataset, tokens: list[np.ndarray]) -> Callable[..., tuple[float, float]]:
    """Returns a function from parameters and numbers of images to two shares: the right name, the right style."""
    names = np.stack([row[0] for row in tokens])
    prompts = np.stack([row[:: len(row) // (1 + len(STYLES))][1:] for row in tokens])  # [n styles l]
    image_features = jax.jit(lambda p, x: unit(functional.bind(graphdef, p).image_features(normalise(x))))
    text_features = jax.jit(lambda p, x: unit(functional.bind(graphdef, p).text_features(x)))

    def measure(params: functional.Params, numbers: np.ndarray) -> tuple[float, float]:
        text = np.asarray(text_features(params, names))
        chunks = np.array_split(numbers, -(-len(numbers) // 256))
        image = np.concatenate([image_features(params, data.read(chunk)) for chunk in chunks])
        concept, style = data.concept[numbers], data.style[numbers]
        flat = prompts[concept].reshape(-1, prompts.shape[-1])
        styled = np.asarray(text_features(params, flat)).reshape(len(numbers), len(STYLES), -1)
        right_name = ((image @ text.T).argmax(1) == concept).mean()
        right_style = (np.einsum("bd,bsd->bs", image, styled).argmax(1) == style).mean()
        return float(right_name), float(right_style)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=2000, help="of both towers")
    parser.add_argument("--image_steps", type=int, default=3000, help="of the image tower after that")
    args = parser.parse_args()

    data = Dataset.load(args.out)
    trained, unseen = data.trained, np.flatnonzero(data.held_out)
    images_of = [trained[data.concept[trained] == c] for c in range(len(data.codes))]
    seen_concepts = np.array([c for c, numbers in enumerate(images_of) if len(numbers)])
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    phrases = [style.phrase for style in STYLES]
    tokens = [tokenize(tokenizer, rows_of(row, phrases)) for row in data.texts]
    counts = [len(row) for row in data.texts]
    cfg = make_config(tokenizer)
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    for tower in ("text_model", "vision_model"):
        print(f"{tower} of {functional.count(shapes[tower]) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "clip"
    measure = make_retrieval(graphdef, data, tokens)

    def report(params: functional.Params) -> None:
        some = trained[np.linspace(0, len(trained) - 1, SHOWN).astype(int)]
        for name, numbers in (("trained on", some), ("held out", unseen)):
            right_name, right_style = measure(params, numbers)
            print(f"{name}: name {right_name:.1%} of {len(counts)}, style {right_style:.1%}", flush=True)

    def read(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return augment(data.read(numbers), data.mirrors[numbers], rng, pixels=SHIFT)

    def pick_styled(concept: int, style: int, rng: np.random.Generator) -> np.ndarray:
        count = counts[concept]
        return tokens[concept][row_in_style(pick(range(count), rng), style, count)]

    def make_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        concepts = rng.choice(seen_concepts, CONCEPTS, replace=False)
        pairs = [rng.choice(images_of[c], 2, replace=len(images_of[c]) < 2) for c in concepts]
        numbers = np.concatenate(pairs)
        names = [tokens[c][pick(range(counts[c]), rng)] for c in concepts]
        styled = [pick_styled(int(data.concept[i]), int(data.style[i]), rng) for i in numbers]
        return read(numbers, rng), np.stack(names + styled)

    optimizer = muon(0.05)
    params = functional.init(shapes, seed=0)
    params["logit_scale"] = np.float32(cfg.logit_scale_init_value)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, args.steps, ema_decay=0.995)
    state = train(
        folder,
        create(params, optimizer),
        step,
        make_batch,
        steps=args.steps,
        report=lambda state: report(state.ema),
        report_every=500,
    )
    model_folder.save(folder, state.ema, cfg.to_dict(), filename="model.safetensors")

    text_model = state.ema["text_model"]
    text_parameters = state.ema
    pool = jax.jit(lambda ids: functional.bind(graphdef, text_parameters).text_model(ids).pooled)
    states = np.concatenate([pool(ids) for ids in np.array_split(np.concatenate(tokens), 64)])
    pooled = np.split(states, np.cumsum([len(row) for row in tokens])[:-1])

    def make_image_batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        numbers = rng.choice(trained, IMAGES, replace=False)
        concept, style = data.concept[numbers], data.style[numbers]
        rows = [pick(range(n), rng) for n in counts]
        names = np.stack([row[r] for row, r in zip(pooled, rows, strict=True)])
        styled = np.stack([pooled[c][rows[c] :: counts[c]][1:] for c in concept])
        return read(numbers, rng), concept, style, names, styled

    def image_report(state: State) -> None:
        report({**state.ema, "text_model": text_model})

    parts = {name: part for name, part in state.ema.items() if name != "text_model"}
    step = make_step(make_image_loss(graphdef, text_model), optimizer, LEARNING_RATE, args.image_steps, ema_decay=0.995)
    state = train(
        folder / "image",
        create(parts, optimizer),
        step,
        make_image_batch,
        steps=args.image_steps,
        report=image_report,
        report_every=500,
    )
    model_folder.save(folder, {**state.ema, "text_model": text_model}, cfg.to_dict(), filename="model.safetensors")


if __name__ == "__main__":
    main()
