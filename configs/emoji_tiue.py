"""The shipped emoji model distilled into its loop-free student, K = 4: from the repository's root, on any machine.

    python train.py --config configs/emoji_tiue.py --workdir runs/emoji_tiue

For a look at it within five minutes:

    python train.py --config configs/emoji_tiue.py --workdir runs/demo --config.train.max_train_minutes=5

The one-step student it is compared with takes `--config.distill.num_inference_steps=1` and, since "leading" would give
it timestep 1, `--config.distill.timestep_spacing=trailing`.

This is how the shipped student was made; docs/emoji.md has grids and measured quality. The 1,200 steps took 24 minutes
on one core of an AMD EPYC. `loss_vsd` says nothing about quality: look at the pictures.
"""

import ml_collections

from configs import sd21_tiue


def get_config() -> ml_collections.ConfigDict:
    config = sd21_tiue.get_config()
    config.model.pretrained_model_name_or_path = "emoji"
    config.data.update({"prompts": "tiue_jax/assets/emoji/prompts.txt", "field": None})
    config.train.update(
        {
            "batch_size": 16,
            "max_train_steps": 1_200,
            "log_every": 10,
            "checkpoint_every": 100,
            "checkpoints_total_limit": 2,
            "validation_every": 100,
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
            "validation_guidance_scale": 4.0,
        }
    )
    # An 8M-parameter UNet: larger steps, adapters on every layer since few have attention, no memory to save.
    config.distill.update(
        {
            "teacher_guidance_scale": 2.5,
            "lora_guidance_scale": 1.0,
            "timestep_weighting": "uniform",
            "lora_rank": 32,
            "lora_alpha": 54.0,
            "lora_targets": (
                *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
                *("conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_out"),
            ),
            "ema_decay": 0.99,
            "student_learning_rate": 5e-5,
            "student_learning_rate_schedule": "linear",
            "compute_dtype": "float32",
            "remat": "none",
        }
    )
    return config
