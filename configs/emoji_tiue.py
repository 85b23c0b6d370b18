"""The recipe tiue_jax/recipes/emoji_tiue.py, by its familiar path: `python train.py --config configs/emoji_tiue.py`."""

from tiue_jax.recipes.emoji_tiue import get_config as get_config
