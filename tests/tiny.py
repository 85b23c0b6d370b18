"""A whole pipeline folder with random weights, small enough to write and to sample from in a test."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tiue_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.schedule import Schedule
from tiue_jax.weights import model_folder
from tiue_jax.weights.names import insert, leaves
from tiue_jax.weights.pipeline_folder import save_pipeline

CONTEXT = 8  # tokens, with start and end
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
MERGES = ["r e", "re d</w>", "a p", "p l", "pl e</w>", "ap ple</w>"]
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = [*LETTERS, *(c + "</w>" for c in LETTERS), *(m.replace(" ", "") for m in MERGES), START, END]

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=2,
)
ONE_LEVEL_UNET = dataclasses.replace(
    UNET, block_out_channels=(8,), down_block_types=UNET.down_block_types[:1], up_block_types=UNET.up_block_types[1:]
)  # compiles faster
TINY_VAE = TinyVAEConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)  # stands in for VAE
VAE = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)  # 2 pixels a latent: images of 16 x 16
TEXT = CLIPTextConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
    bos_token_id=len(VOCABULARY) - 2,
    eos_token_id=len(VOCABULARY) - 1,
    pad_token_id=len(VOCABULARY) - 1,
)


def write_tokenizer(folder: Path) -> Path:
    """A CLIPTokenizer of single letters and a few merges."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **special}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_params(cls, cfg, seed: int):
    """Parameters away from their initial values, norms and biases too."""
    rng = np.random.default_rng(seed)
    _, shapes = functional.abstract(cls, cfg)
    params = functional.init(shapes, seed)
    for path, leaf in leaves(params):
        insert(params, path, (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32))
    return params


def write_tiny_vae(folder: Path, cfg: TinyVAEConfig = TINY_VAE) -> Path:
    """The folder of a tiny autoencoder."""
    model_folder.save(folder, random_params(AutoencoderTiny, cfg, 3), cfg.to_dict())
    return folder


def write_pipeline(
    folder: Path,
    tiue_config: dict | None = None,
    schedule: Schedule | None = None,
    unet: UNetConfig = UNET,
    text_encoder: CLIPTextConfig = TEXT,
    vae: VAEConfig = VAE,
) -> Path:
    """A pipeline folder; a student's where `tiue_config` is given."""
    folder = Path(folder)
    save_pipeline(
        folder,
        unet=(unet, random_params(UNet, unet, 0)),
        vae=(vae, random_params(AutoencoderKL, vae, 1)),
        text_encoder=(text_encoder, random_params(CLIPTextModel, text_encoder, 2)),
        tokenizer_dir=write_tokenizer(folder.parent / f"{folder.name}-tokenizer"),
        schedule=Schedule() if schedule is None else schedule,
        tiue_config=tiue_config,
    )
    return folder
