"""The shipped emoji model distilled into its loop-free student, K = 4: from the repository's root, on any machine.

    python train.py --config configs/emoji_tiue.py --workdir runs/emoji_tiue

For a look at it within five minutes, and for the one-step student it is compared with:

    python train.py --config configs/emoji_tiue.py --workdir runs/demo --config.train.max_train_minutes=5
    python train.py --config configs/emoji_tiue.py --workdir runs/emoji_k1 --config.distill.num_inference_steps=1

What to expect is in docs/emoji.md: steps a second, grids and measured quality. `loss_vsd` starts at 0, since both
teachers agree at first, rises, and then says nothing about quality: look at the pictures.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        {
            "pretrained_model_name_or_path": "emoji",
            "clip_model_name_or_path": config_dict.placeholder(str),  # local folders, for clip_weight > 0
            "tiny_vae_name_or_path": config_dict.placeholder(str),
        }
    )
    config.data = ml_collections.ConfigDict(
        {
            "prompts": "tiue_jax/assets/emoji/prompts.txt",
            "field": config_dict.placeholder(str),
        }
    )
    config.train = ml_collections.ConfigDict(
        {
            "seed": 0,
            "batch_size": 32,
            "max_train_steps": 10_000,
            "max_train_minutes": config_dict.placeholder(float),
            "log_every": 10,
            "checkpoint_every": 250,
            "checkpoints_total_limit": 2,
            "validation_every": 250,
            "validation_prompts": (
                "a red apple",
                "a dog face",
                "a sunflower",
                "a rocket",
                "a birthday cake",
                "an octopus",
                "a fire engine",
                "a smiling face with sunglasses",
            ),
            "validation_num_inference_steps": 25,
            "validation_guidance_scale": 3.0,
            "mesh_data": -1,
            "mesh_fsdp": 1,
            "mesh_replicate_below": 2**16,  # elements
        }
    )
    config.distill = ml_collections.ConfigDict(
        {
            "num_inference_steps": 4,
            "timestep_spacing": "trailing",
            "teacher_guidance_scale": 4.5,
            "lora_guidance_scale": 4.5,
            "min_timestep": 20,
            "max_timestep": 980,
            "timestep_weighting": "one_minus_alphas_cumprod",
            "lora_rank": 16,
            "lora_alpha": 27.0,
            "lora_targets": ("to_q", "to_v"),
            "kl_weight": 0.1,
            "kl_batch_size": 8.0,
            "clip_weight": 0.0,  # 0.1 adds L_clip, which the paper's own results do without
            "clip_decay_steps": config_dict.placeholder(int),  # where it has fallen to 0; the end of the run if None
            "clip_threshold": 0.35,
            "clip_normalize": True,  # pixels by CLIP's mean and standard deviation
            "text_dropout": 0.1,
            "ema_decay": 0.99,
            "student_learning_rate": 1e-4,
            "student_learning_rate_schedule": "constant",
            "lora_learning_rate": 1e-3,
            "lora_learning_rate_schedule": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "adam_b1": 0.9,
            "adam_b2": 0.999,
            "adam_eps": 1e-8,
            "compute_dtype": "float32",
            "remat": False,
            "latent_size": config_dict.placeholder(int),  # the UNet\'s own if None
        }
    )
    return config.lock()
