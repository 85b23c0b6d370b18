"""Stable Diffusion 2.1-base at 512 px, distilled into a loop-free student, K = 4, by TiUE (arXiv 2505.21960).

The same command starts a run and resumes it. On a Cloud TPU slice, every host runs it. On a v5e-16 (four hosts of four
16 GB chips) or a v4-32 (four hosts of four 32 GB chips):

    gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="cd tiue-jax && .venv/bin/python train.py \\
        --config configs/sd21_tiue.py --workdir gs://$BUCKET/runs/sd21 --config.data.prompts=gs://$BUCKET/journeydb"

On one host of eight 80 GB GPUs, each of which can hold the whole state:

    tiue train --config sd21_tiue --workdir runs/sd21 --config.data.prompts=data/journeydb \\
        --config.train.mesh_data=8 --config.train.mesh_fsdp=1

`tiue plan` says beforehand whether a step fits. If it does not, `--config.distill.gradient_accumulation_steps=2` halves
the activations and changes nothing but rounding. docs/pods.md describes the whole way: machines, prompts, planning,
training, watching, resuming and the exported student.

What to expect: `train/loss_vsd` starts at 0, since both teachers agree then, and says nothing about quality. Look at
`samples/` instead: every 1,000 steps it shows the student's images above its teacher's. This recipe has not been run at
full size, nor on a TPU or a GPU. The training step is tested against PyTorch on small models.

The paper trains on 1,418,723 JourneyDB captions for 3 epochs: 66,500 steps of 64 prompts, 8 on each of 8 devices. Here
64 is the global batch size. The mathematics does not depend on the number of devices that share it.

Timesteps are spaced "leading", as in the paper. The last decoder pass then weighs almost nothing: 0.012; the
first weighs 2.5. `--config.distill.timestep_spacing=trailing` gives every pass a real weight, but the
images of the emoji model become worse (docs/ablations.md).

These are the paper's settings. On the small emoji model others are much better, by docs/ablations.md:
`--config.distill.timestep_weighting=uniform`, and guidance for the teacher only,
`--config.distill.lora_guidance_scale=1 --config.distill.teacher_guidance_scale=2.5`. Larger models were not tried.
"""

import ml_collections

from tiue_jax.training.settings import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the recipe."""
    config = default_config()
    config.model.pretrained_model_name_or_path = "sd21-base"
    config.data.prompts = "data/journeydb"
    config.train.validation_prompts = (
        "a red apple on a wooden table",
        "a photo of an astronaut riding a horse on mars",
        "portrait of an old fisherman, oil painting",
        "a small house in a snowy forest at night",
        "a cup of coffee beside an open book",
        "a corgi wearing sunglasses on the beach",
        "a city street in the rain, neon lights",
        "a bowl of ramen, top view",
    )
    # The state of an 866M-parameter student does not fit on one 16 GB chip: shard it, and recompute activations.
    config.train.mesh_data = 1
    config.train.mesh_fsdp = -1
    config.distill.remat = "full"
    return config
