"""Trains a tiny CLIP on the emoji: {out}/clip (transformers format). Its text encoder is the pipeline's.

    python examples/emoji/train_clip.py --out runs/emoji --minutes 11 --image_minutes 10

First both towers, contrastive over batches of concepts, with both drawings of a concept as positives of its text. Then,
with the text tower fixed, so that the UNet can be trained on it meanwhile, the image tower and the projections against
the names of all concepts. Pictures are mirrored, shifted, blurred, recoloured and made noisy so that the model also
judges generated ones. Prints how often it retrieves the right name among all.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pictures import augment, load_mirrors, load_pictures
from texts import load_texts, pick
from training import adamw, create, make_step, train
from transformers import CLIPTokenizer

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from tiue_jax.weights import model_folder

CONCEPTS = 96  # of a batch; twice as many pictures
PICTURES = 128  # of a batch of the second stage
LEARNING_RATE = 1e-3
PROJECTION = 128
# of OpenAI's CLIP, so that the preprocessing is the same for the tiny model and for the real ones
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def make_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
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
            image_size=32,
            patch_size=8,
            projection_dim=PROJECTION,
        ),
        projection_dim=PROJECTION,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    """Token ids int32 [b l], padded to the context."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"].astype(np.int32)


def normalise(pictures: jax.Array) -> jax.Array:
    """Pictures [b h w 3] in [-1, 1] as CLIP's pixel values."""
    return ((pictures + 1) / 2 - MEAN[None, None, None]) / STD[None, None, None]


def degrade(pictures: jax.Array, key: jax.Array) -> jax.Array:
    """Random blur, contrast, tint and noise for each of pictures [b h w 3] in [-1, 1]."""
    b = pictures.shape[0]
    keys = jax.random.split(key, 5)
    padded = jnp.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = sum(padded[:, y : y + 32, x : x + 32] for y in range(3) for x in range(3)) / 9
    weight = jax.random.uniform(keys[0], (b, 1, 1, 1), maxval=0.8)
    pictures = pictures + weight * (blurred - pictures)
    contrast = jax.random.uniform(keys[1], (b, 1, 1, 1), minval=0.8, maxval=1.2)
    pictures = contrast * pictures + 0.08 * jax.random.normal(keys[2], (b, 1, 1, 3))
    strength = jax.random.uniform(keys[3], (b, 1, 1, 1), maxval=0.15)
    return jnp.clip(pictures + strength * jax.random.normal(keys[4], pictures.shape), -1, 1)


def unit(x: jax.Array | np.ndarray) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def make_loss(graphdef):
    def loss_fn(params, batch, key):
        pictures, tokens = batch  # [2n h w 3], picture i shows text i // 2; [n l]
        clip = functional.bind(graphdef, params)
        image = unit(clip.image_features(normalise(degrade(pictures, key))))
        text = unit(clip.text_features(tokens))
        scale = jnp.exp(jnp.minimum(clip.logit_scale[...], jnp.log(100.0)))
        logits = scale * image @ text.T  # [2n n]
        label = jnp.arange(len(image)) // 2
        positive = logits[jnp.arange(len(image)), label]
        to_text = (jax.nn.logsumexp(logits, axis=1) - positive).mean()
        to_image = (jax.nn.logsumexp(logits, axis=0)[label] - positive).mean()
        return (to_text + to_image) / 2, {"accuracy": (logits.argmax(1) == label).mean(), "scale": scale}

    return loss_fn


def make_image_loss(graphdef, text_model):
    """The second stage: the names of all concepts as candidates; `text_model` is not trained."""

    def loss_fn(params, batch, key):
        pictures, labels, pooled = batch  # [b h w 3], [b], text states at the end of text [n d]
        clip = functional.bind(graphdef, {**params, "text_model": text_model})
        image = unit(clip.image_features(normalise(degrade(pictures, key))))
        text = unit(clip.text_projection(pooled))
        logits = jnp.exp(jnp.minimum(clip.logit_scale[...], jnp.log(100.0))) * image @ text.T  # [b n]
        right = logits[jnp.arange(len(labels)), labels]
        accuracy = (logits.argmax(1) == labels).mean()
        return (jax.nn.logsumexp(logits, axis=1) - right).mean(), {"accuracy": accuracy}

    return loss_fn


def retrieval(graphdef, params, pictures: np.ndarray, tokens: np.ndarray, batch: int = 256) -> float:
    """Share of pictures [n h w 3] in [-1, 1] that are nearest to their own text among all of tokens [n l]."""

    @jax.jit
    def image_features(params, x):
        return functional.bind(graphdef, params).image_features(normalise(x))

    text = unit(jax.jit(lambda p, x: functional.bind(graphdef, p).text_features(x))(params, tokens))
    chunks = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    image = unit(np.concatenate([image_features(params, x) for x in chunks]))
    return float((np.asarray(image @ text.T).argmax(1) == np.arange(len(tokens))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--minutes", type=float, default=11, help="of both towers")
    parser.add_argument("--image_minutes", type=float, default=10, help="of the image tower after that")
    args = parser.parse_args()

    pictures, mirrors, texts = load_pictures(args.out), load_mirrors(args.out), load_texts(args.out)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    tokens = [tokenize(tokenizer, row) for row in texts]
    names = np.stack([row[0] for row in tokens])
    cfg = make_config(tokenizer)
    graphdef, shapes = functional.abstract(CLIPModel, cfg.text_config, cfg.vision_config, cfg.projection_dim)
    for tower in ("text_model", "vision_model"):
        print(f"{tower} of {functional.count(shapes[tower]) / 1e6:.2f}M parameters", flush=True)
    folder = args.out / "clip"

    def report(params) -> None:
        shares = [retrieval(graphdef, params, pictures[i::2], names) for i in range(2)]
        print(f"retrieval@1 of {len(names)} names: drawings 0 {shares[0]:.1%}, drawings 1 {shares[1]:.1%}", flush=True)

    def make_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        concepts = rng.choice(len(texts), CONCEPTS, replace=False)
        shown = (2 * concepts[:, None] + np.arange(2)).reshape(-1)
        text = np.stack([pick(tokens[i], rng) for i in concepts])
        return augment(pictures[shown], mirrors[shown], rng, pixels=2), text

    optimizer = adamw(0.05)
    params = functional.init(shapes, seed=0)
    params["logit_scale"] = np.float32(cfg.logit_scale_init_value)
    step = make_step(make_loss(graphdef), optimizer, LEARNING_RATE, ema_decay=0.995)
    state = create(params, optimizer)
    state = train(folder, state, step, make_batch, minutes=args.minutes, report=lambda state: report(state.ema))
    model_folder.save(folder, state.ema, cfg.to_dict(), filename="model.safetensors")

    text_model = state.ema["text_model"]
    pool = jax.jit(lambda ids: functional.bind(graphdef, state.ema).text_model(ids).pooled)
    pooled = [np.asarray(pool(row)) for row in tokens]

    def make_image_batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = rng.choice(len(pictures), PICTURES, replace=False)
        shown = augment(pictures[chosen], mirrors[chosen], rng, pixels=2)
        return shown, chosen // 2, np.stack([pick(row, rng) for row in pooled])

    trained = {name: part for name, part in state.ema.items() if name != "text_model"}
    step = make_step(make_image_loss(graphdef, text_model), optimizer, LEARNING_RATE, ema_decay=0.995)
    state = train(
        folder / "image",
        create(trained, optimizer),
        step,
        make_image_batch,
        minutes=args.image_minutes,
        report=lambda state: report({**state.ema, "text_model": text_model}),
    )
    model_folder.save(folder, {**state.ema, "text_model": text_model}, cfg.to_dict(), filename="model.safetensors")


if __name__ == "__main__":
    main()
