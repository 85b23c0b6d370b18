"""The recipe that every system of the ablations changes: `emoji_tiue` as it was before they were made.

The ablations are to improve `emoji_tiue`. What they are compared with must stay the same, or all would count as old.
"""

import ml_collections

from tiue_jax.recipes import emoji_tiue


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the recipe."""
    config = emoji_tiue.get_config()
    config.distill.update(
        {
            "teacher_guidance_scale": 2.5,
            "teacher_guidance_scale_max": None,
            "lora_updates_per_step": 1,
        }
    )
    return config
