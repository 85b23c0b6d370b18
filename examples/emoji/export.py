"""Assembles the shipped models in float16: {assets}/emoji (a pipeline in diffusers' layout) and {assets}/emoji-clip.

The prompts for the distillation are written to {assets}/emoji/prompts.txt.

    python examples/emoji/export.py --out runs/emoji --assets tiue_jax/assets
    python examples/emoji/export.py --student runs/emoji_tiue/student
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from dataset import Dataset
from styles import STYLES
from texts import rows_of
from train_clip import MEAN, STD

from tiue_jax.files import write_json
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPConfig, CLIPModel
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.models.vae import AutoencoderKL, VAEConfig
from tiue_jax.pipeline import Pipeline
from tiue_jax.schedule import Schedule
from tiue_jax.temporary import temporary_folder
from tiue_jax.weights import fingerprint, model_folder
from tiue_jax.weights.pipeline_folder import save_pipeline

SHARED = ("vae", "text_encoder", "tokenizer")  # by teacher and student
SAMPLING = {"sampler": "ddim", "num_inference_steps": 25, "guidance_scale": 2.5}


def load(folder: Path, cls: Any, config: Any) -> tuple[Any, functional.Params]:
    """Returns the configuration and the parameters of a model folder."""
    cfg = config.from_dict(model_folder.read_config_dict(folder))
    parts = (cfg.text_config, cfg.vision_config, cfg.projection_dim) if cls is CLIPModel else (cfg,)
    return cfg, model_folder.load(folder, functional.abstract(cls, *parts)[1])


def save_clip(folder: Path, cfg: CLIPConfig, params: functional.Params, tokenizer: Path) -> None:
    """Writes the tiny CLIP as transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessor read it."""
    model_folder.save(folder, params, cfg.to_dict(), np.float16, "model.safetensors")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    size = cfg.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN.tolist(),
        "image_std": STD.tolist(),
    }
    write_json(folder / "preprocessor_config.json", processor)


def save_student(assets: Path, student: Path) -> None:
    """Writes a distilled pipeline as emoji-tiue. The parts in SHARED become links to those of its teacher, emoji.

    Raises:
      ValueError: one of these parts is not that of emoji.
    """
    folder = assets / "emoji-tiue"
    pipeline = Pipeline.from_pretrained(student)
    with temporary_folder(assets, "emoji-tiue") as work:
        new = work / "new"
        pipeline.save_pretrained(new, np.float16)
        mine, teachers = fingerprint.of_pipeline(new), fingerprint.of_pipeline(assets / "emoji")
        if others := [part for part in SHARED if mine[part] != teachers[part]]:
            raise ValueError(f"{student}: {', '.join(others)} must be those of {assets / 'emoji'}, its teacher")
        for part in SHARED:
            shutil.rmtree(new / part)
            (new / part).symlink_to(Path("..") / "emoji" / part, target_is_directory=True)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    report(folder)


def report(folder: Path) -> None:
    """Prints the size of a folder, links not counted."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--assets", type=Path, default=Path("tiue_jax/assets"))
    parser.add_argument("--student", type=Path, help="instead: a distilled pipeline folder, shipped as emoji-tiue")
    args = parser.parse_args()

    if args.student is not None:
        save_student(args.assets, args.student)
        return
    clip_config, clip = load(args.out / "clip", CLIPModel, CLIPConfig)
    save_pipeline(
        args.assets / "emoji",
        overwrite=True,
        unet=load(args.out / "unet", UNet, UNetConfig),
        vae=load(args.out / "vae", AutoencoderKL, VAEConfig),
        text_encoder=(clip_config.text_config, {"text_model": clip["text_model"]}),
        tokenizer_dir=args.out / "tokenizer",
        schedule=Schedule(),
        tiue_config=SAMPLING,
        dtype=np.float16,
    )
    phrases = [style.phrase for style in STYLES]
    texts = dict.fromkeys(text for row in Dataset.load(args.out).texts for text in rows_of(row, phrases))
    (args.assets / "emoji" / "prompts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    save_clip(args.assets / "emoji-clip", clip_config, clip, args.out / "tokenizer")
    report(args.assets / "emoji")
    report(args.assets / "emoji-clip")


if __name__ == "__main__":
    main()
