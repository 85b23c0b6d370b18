"""Clip skip: the text encoder without its last layers. It is diffusers' `clip_skip`, kept as a smaller text encoder.

Stable Diffusion uses the output of the text encoder's last layer, after the final layer norm. Some models, most of
those for illustrations, were trained on the output of an earlier layer, after the same norm.
"""

import dataclasses

from tiue_jax.models.clip import CLIPTextConfig


def skip_layers(cfg: CLIPTextConfig, clip_skip: int) -> CLIPTextConfig:
    """The configuration of a text encoder without its last `clip_skip` layers.

    Its text embedding is diffusers' `hidden_states[-(clip_skip + 1)]` after the final layer norm. The programs that
    count from 1, "Clip skip 2", mean `clip_skip` = 1. The text encoder of SD 2.x has no 24th layer in its folder:
    `clip_skip` = 1 leaves 22 layers.

    Raises:
        ValueError: no layer is left, or `clip_skip` is no integer >= 0.
    """
    most = cfg.num_hidden_layers - 1
    if type(clip_skip) is not int or not 0 <= clip_skip <= most:
        layers = f"the text encoder has {cfg.num_hidden_layers} layers, and one must be left"
        raise ValueError(f"clip_skip must be an integer from 0 to {most}, got {clip_skip!r}: {layers}")
    return dataclasses.replace(cfg, num_hidden_layers=cfg.num_hidden_layers - clip_skip)
