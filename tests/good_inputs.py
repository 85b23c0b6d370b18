"""Good inputs of every kind that is read, and what reads them. malformed.py makes malformed ones of them."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests import tiny
from tiue_jax.cli import train
from tiue_jax.convert import export, export_compiled, lora_files
from tiue_jax.convert.compiled_sampler import Sampler
from tiue_jax.data import corpus, embeddings
from tiue_jax.data.prompts import load_prompts
from tiue_jax.models import functional, lora
from tiue_jax.models.clip import CLIPConfig, CLIPTextModel
from tiue_jax.models.tiny_vae import TinyVAEConfig
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import hub, pipeline_folder

LORA = lora.LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))
KEY = {"prompts": "a", "tokenizer": "b", "text_encoder": "c"}


def _encode(prompts: list[str]) -> np.ndarray:
    """Stands in for a text encoder."""
    return np.ones((len(prompts), 4, 8), np.float32)


class Inputs:
    """Good inputs below a folder."""

    def __init__(self, root: Path):
        self.root = root
        sampling = {"sampler": "tiue", "num_inference_steps": 2, "timestep_spacing": "trailing"}
        self.model = tiny.write_pipeline(root / "model", sampling, unet=tiny.ONE_LEVEL_UNET)
        self.tiny_vae = tiny.write_tiny_vae(root / "tiny_vae")
        self.clip = root / "clip"
        self.clip.mkdir()
        shutil.copyfile(hub.ASSETS / "emoji-clip" / "config.json", self.clip / "config.json")
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("a red apple\na pear\n")
        with contextlib.redirect_stderr(io.StringIO()):
            corpus.write([self.prompts], root / "corpus")
            embeddings.write(root / "embeddings", load_prompts(self.prompts), _encode, KEY, batch_size=2)
        pipe = Pipeline.from_pretrained(self.model)
        export_compiled.export_compiled(pipe, root / "compiled", platforms=("cpu",))
        self.shapes = {
            "unet": pipeline_folder.part_shapes(self.model, "unet", pipeline_folder.read_configs(self.model)),
            "text_encoder": functional.abstract(CLIPTextModel, tiny.TEXT)[1],
        }
        _, adapters = lora.split(functional.abstract(UNet, tiny.ONE_LEVEL_UNET, lora=LORA)[1])
        self.lora = lora.save(root / "lora", lora.init(adapters, 0), LORA)
        self.run = root / "run"
        self.run.mkdir()
        settings = train.read_flags(["train.py", "--config", "emoji_tiue", "--workdir", "x"]).settings
        (self.run / "config.json").write_text(json.dumps(settings.to_dict()))

    def read_pipeline(self) -> None:
        pipe = Pipeline.from_pretrained(self.model)
        pipe.stream(["red"])  # checks the arguments and the defaults; nothing is computed yet
        pipe.tokenize(["a red apple"])

    def read_lora(self) -> None:
        lora_files.read_lora(self.lora, self.shapes)

    def read_compiled(self) -> None:
        Sampler(self.root / "compiled").tokenize("a red apple")

    def read_corpus(self) -> None:
        corpus.open_prompts(self.root / "corpus").read([0, 1])

    def read_embeddings(self) -> None:
        embeddings.Embeddings(self.root / "embeddings", KEY).read([0, 1])

    def read_run(self) -> None:
        export.export_run(self.run, self.root / "exported")

    def read_vae(self) -> None:
        pipeline_folder.read_config(self.tiny_vae, TinyVAEConfig)

    def read_clip(self) -> None:
        pipeline_folder.read_config(self.clip, CLIPConfig)

    def readers(self) -> dict[Path, Callable[[], None]]:
        """The function that reads the files of each folder."""
        return {
            self.model: self.read_pipeline,
            self.tiny_vae: self.read_vae,
            self.clip: self.read_clip,
            self.root / "corpus": self.read_corpus,
            self.root / "embeddings": self.read_embeddings,
            self.root / "compiled": self.read_compiled,
            self.lora.parent: self.read_lora,
            self.run: self.read_run,
        }
