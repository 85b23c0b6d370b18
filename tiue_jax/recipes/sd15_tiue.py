"""Stable Diffusion 1.5 at 512 px, distilled into a loop-free student, K = 4: the recipe sd21_tiue with another teacher.

What sd21_tiue says holds here too: machines, what to expect, and that it has not been run at full size. On a v5e-16 or
a v4-32, the same command on every host, and again to resume:

    gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="cd tiue-jax && .venv/bin/python train.py \\
        --config configs/sd15_tiue.py --workdir gs://$BUCKET/runs/sd15 --config.data.prompts=gs://$BUCKET/journeydb"

On one host of eight 80 GB GPUs:

    tiue train --config sd15_tiue --workdir runs/sd15 --config.data.prompts=data/journeydb \\
        --config.train.mesh_data=8 --config.train.mesh_fsdp=1

Text embeddings made beforehand (`tiue data embed`) take 118 kB a prompt here: 77 tokens of width 768.
"""

import ml_collections

from tiue_jax.recipes import sd21_tiue


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the recipe."""
    config = sd21_tiue.get_config()
    config.model.pretrained_model_name_or_path = "sd15"
    return config
