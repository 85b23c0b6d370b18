"""Stable Diffusion 1.5 at 512 px distilled into a loop-free student, K = 4: sd21_tiue.py with another teacher.

    python train.py --config configs/sd15_tiue.py --workdir runs/sd15_tiue --config.data.prompts=train_anno.jsonl

It has not been run here at full size; the training step is tested against PyTorch on small models.
"""

import ml_collections

from configs import sd21_tiue


def get_config() -> ml_collections.ConfigDict:
    config = sd21_tiue.get_config()
    config.model.pretrained_model_name_or_path = "sd15"
    return config
