"""Diffusers and transformers folders to parameter trees and back: strict, bit-exact, safetensors only, no PyTorch."""

from tiue_jax.convert.folder import check_pipeline, load, read_config, save
from tiue_jax.convert.names import Params
from tiue_jax.convert.stored import TRANSFORMERS_WEIGHTS, WEIGHTS
from tiue_jax.convert.tree import from_torch_names, to_torch_names

__all__ = [
    "TRANSFORMERS_WEIGHTS",
    "WEIGHTS",
    "Params",
    "check_pipeline",
    "from_torch_names",
    "load",
    "read_config",
    "save",
    "to_torch_names",
]
