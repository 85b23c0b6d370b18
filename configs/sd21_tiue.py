"""The recipe tiue_jax/recipes/sd21_tiue.py, by its familiar path: `python train.py --config configs/sd21_tiue.py`."""

from tiue_jax.recipes.sd21_tiue import get_config as get_config
