"""The recipe tiue_jax/recipes/sd15_tiue.py, by its familiar path: `python train.py --config configs/sd15_tiue.py`."""

from tiue_jax.recipes.sd15_tiue import get_config as get_config
