"""Stable Diffusion 2.1-base at 512 px distilled into a loop-free student, K = 4: the recipe of TiUE (arXiv 2505.21960).

The paper trains on 1,418,723 JourneyDB captions for 3 epochs: 66,500 steps of 64 prompts, 8 on each of 8 devices. Here
64 is the global batch and the mathematics does not depend on how many devices share it: 4 on each of 16 chips, say.
docs/pods.md goes all the way: machines, prompts, planning, training, watching, resuming, the exported student.

A v5e-16, four hosts of four 16 GB chips: the same command on every host, and again to resume.

    gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="cd tiue-jax && .venv/bin/python train.py \\
        --config configs/sd21_tiue.py --workdir gs://$BUCKET/runs/sd21 --config.data.prompts=gs://$BUCKET/journeydb"

A v4-32, four hosts of four 32 GB chips: the same command. One host of eight 80 GB GPUs, which may each hold the whole
state:

    python train.py --config configs/sd21_tiue.py --workdir runs/sd21 --config.data.prompts=data/journeydb \\
        --config.train.mesh_data=8 --config.train.mesh_fsdp=1

`python -m tiue_jax.plan` says beforehand what fits. Where a step does not, gradient_accumulation_steps=2 needs the
activations of half the batch only, and changes no more than the rounding.

What to expect: `train/loss_vsd` starts at 0, where both teachers agree, and says nothing about quality. Look at
`samples/`, the student's pictures above its teacher's, every 1,000 steps. A later paper's table gives this student FID
13.49 and CLIP score .31 on COCO 2014, its teacher in many steps 9.60 and .32.

Timesteps are spaced "leading", so that the last decoder pass weighs almost nothing: 0.012 where the first weighs 2.5.
`--config.distill.timestep_spacing=trailing` gives every pass a real weight.

The other recipes here are this one with other values. It has not been run at full size, nor on any TPU; the training
step is tested against PyTorch on small models.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        {
            "pretrained_model_name_or_path": "sd21-base",
            "clip_model_name_or_path": config_dict.placeholder(str),  # local folders, for clip_weight > 0
            "tiny_vae_name_or_path": config_dict.placeholder(str),
        }
    )
    config.data = ml_collections.ConfigDict(
        {
            "prompts": "data/journeydb",  # a folder that data.prepare made, or a file
            "field": config_dict.placeholder(str),  # of the prompt in JSON lines: "Task2.Caption" in JourneyDB's
            "embeddings": config_dict.placeholder(str),  # a folder that data.embed made; None encodes in the step
        }
    )
    config.train = ml_collections.ConfigDict(
        {
            "seed": 0,
            "batch_size": 64,  # on all devices together
            "max_train_steps": 66_500,
            "max_train_minutes": config_dict.placeholder(float),
            "log_every": 50,
            "checkpoint_every": 1_000,
            "checkpoints_total_limit": 3,
            "checkpoints_best_metric": config_dict.placeholder(str),  # "eval/teacher_distance" keeps the best one too
            "max_skipped_steps": 10,  # in a row, of a loss or gradient that is not finite
            "validation_every": 1_000,
            "validation_prompts": (
                "a red apple on a wooden table",
                "a photo of an astronaut riding a horse on mars",
                "portrait of an old fisherman, oil painting",
                "a small house in a snowy forest at night",
                "a cup of coffee beside an open book",
                "a corgi wearing sunglasses on the beach",
                "a city street in the rain, neon lights",
                "a bowl of ramen, top view",
            ),
            "validation_num_inference_steps": 25,
            "validation_guidance_scale": 7.5,
            "mesh_data": 1,
            "mesh_fsdp": -1,
            "mesh_replicate_below": 2**16,  # elements
            "mesh_replicate_frozen": False,  # True where the teacher fits on each device beside its part of the state
        }
    )
    config.distill = ml_collections.ConfigDict(
        {
            "num_inference_steps": 4,
            "timestep_spacing": "leading",
            "teacher_guidance_scale": 4.5,
            "lora_guidance_scale": 4.5,
            "min_timestep": 20,
            "max_timestep": 980,
            "timestep_weighting": "one_minus_alphas_cumprod",
            "lora_rank": 64,
            "lora_alpha": 108.0,
            "lora_targets": ("to_q", "to_v"),
            "kl_weight": 0.1,
            "kl_batch_size": 8.0,
            "clip_weight": 0.0,  # 0.1 adds L_clip, which the paper's own results do without
            "clip_decay_steps": config_dict.placeholder(int),  # where it has fallen to 0; the end of the run if None
            "clip_threshold": 0.35,
            "clip_normalize": True,  # pixels by CLIP's mean and standard deviation
            "text_dropout": 0.1,
            "ema_decay": 0.9999,
            "student_learning_rate": 1e-6,
            "student_learning_rate_schedule": "constant",
            "lora_learning_rate": 1e-3,
            "lora_learning_rate_schedule": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "adam_b1": 0.9,
            "adam_b2": 0.999,
            "adam_eps": 1e-8,
            "compute_dtype": "bfloat16",
            "gradient_accumulation_steps": 1,
            "remat": "full",  # all but the blocks' inputs is computed again; "streams", "attention", "none": ever less
            "latent_size": config_dict.placeholder(int),  # the UNet's own if None
        }
    )
    return config.lock()
