"""The Stable Diffusion UNet, after diffusers' UNet2DConditionModel, cut in two: `encode` and `decode`.

TiUE (arXiv 2505.21960) runs `encode` once and `decode` at several timesteps; a plain diffusion step is both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
from flax import nnx

from tiue_jax import sharding
from tiue_jax.models import attention, functional, layers, rows
from tiue_jax.models.lora import LoRAConfig, adapt
from tiue_jax.models.sharing import SkipResnetBlock2D

_CLASS = "UNet2DConditionModel"
# Fields of UNet2DConditionModel that select something this UNet does not have, with the one value it stands for.
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# What the backward pass finds of a block's activations; the rest it computes again.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # everything: jax.checkpoint is not used
    "full": jax.checkpoint_policies.nothing_saveable,  # the block's inputs
    "streams": jax.checkpoint_policies.save_only_these_names(layers.STREAM),  # and their attention's and MLP's inputs
    "attention": jax.checkpoint_policies.save_only_these_names(layers.STREAM, attention.OUTPUT),  # and its results
}
_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' `unet/config.json` that SD 1.x and 2.x use; the defaults are SD 1.5's.

    `attention_head_dim` is, as diffusers misnames it, the number of heads: one for all blocks or one per block.
    `upcast_attention` asks for float32 attention logits, which is what this UNet always does.
    """

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    time_cond_proj_dim: int | None = None  # width of the guidance embedding that latent consistency models take

    def __post_init__(self):
        n = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"unet {name} must have one entry per block ({n}), got {list(getattr(self, name))}")
        for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ValueError(f"unet {name} must be among {list(known)}, got {kind!r}")
        for name in ("layers_per_block", "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise ValueError(f"unet {name} must be a number or one per block ({n}), got {list(value)}")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"unet downsample_padding must be 0 or 1, got {self.downsample_padding}")
        if not isinstance(self.norm_num_groups, int):
            raise ValueError(f"unet norm_num_groups must be a number, got {self.norm_num_groups}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Reads a diffusers config.

        Raises:
            ValueError: a field that this UNet does not support, with its name and value; an inconsistent config.
        """
        if (kind := config.get("_class_name", _CLASS)) != _CLASS:
            raise ValueError(f"unet config field '_class_name' is {kind!r}: only {_CLASS!r} is supported")
        known = {field.name for field in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}
        for name, value in config.items():
            if name in known:
                kept[name] = tuple(value) if isinstance(value, list) else value
            elif not name.startswith("_") and (name not in _FIXED or value != _FIXED[name]):
                wanted = f"only {_FIXED[name]!r} is supported" if name in _FIXED else "the field is unknown"
                raise ValueError(f"unet config field {name!r} is {value!r}: {wanted}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """The diffusers config, loadable by UNet2DConditionModel."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": _CLASS, **fields}

    def per_block(self, name: str) -> tuple[int, ...]:
        """A field that is one number or one per block, as one per block."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class Features(NamedTuple):
    """What the encoder hands to the decoder: everything of it that the timestep of the decoder does not touch."""

    mid: jax.Array  # [b h/2^n w/2^n c]
    skips: tuple[jax.Array, ...]  # first to last, each [b h w c] at its own level


class DownBlock(nnx.Module):
    """ResNets, each followed by a transformer where `heads` is given, then a downsampler."""

    def __init__(self, cin: int, cout: int, depth: int, heads: int | None, common: "_Common", *, downsample: bool):
        self.resnets = nnx.List([common.resnet(cin if i == 0 else cout, cout) for i in range(depth)])
        self.attentions = nnx.List([common.transformer(cout, heads) for _ in range(depth)] if heads else [])
        down = [layers.Downsample2D(cout, padding=common.cfg.downsample_padding, rngs=common.rngs)]
        self.downsamplers = nnx.List(down if downsample else [])


class MidBlock(nnx.Module):
    """ResNet, transformer, ResNet at the lowest resolution."""

    def __init__(self, channels: int, heads: int, common: "_Common"):
        self.resnets = nnx.List([common.resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([common.transformer(channels, heads)])


class UpBlock(nnx.Module):
    """ResNets on concat([h, skip]), each followed by a transformer where `heads` is given, then an upsampler."""

    def __init__(self, cins: list[int], cout: int, heads: int | None, common: "_Common", *, upsample: bool):
        self.resnets = nnx.List([common.resnet(cin, cout, SkipResnetBlock2D) for cin in cins])
        self.attentions = nnx.List([common.transformer(cout, heads) for _ in cins] if heads else [])
        self.upsamplers = nnx.List([layers.Upsample2D(cout, rngs=common.rngs)] if upsample else [])


class _Common:
    """What all blocks of one level share while they are built."""

    def __init__(self, cfg: UNetConfig, level: int, rngs: nnx.Rngs):
        self.cfg, self.level, self.rngs = cfg, level, rngs

    def resnet(
        self, cin: int, cout: int, kind: type[layers.ResnetBlock2D] = layers.ResnetBlock2D
    ) -> layers.ResnetBlock2D:
        cfg = self.cfg
        time_dim = 4 * cfg.block_out_channels[0]
        return kind(cin, cout, time_dim, groups=cfg.norm_num_groups, eps=cfg.norm_eps, rngs=self.rngs)

    def transformer(self, channels: int, heads: int) -> layers.Transformer2DModel:
        cfg = self.cfg
        return layers.Transformer2DModel(
            channels,
            heads,
            cfg.per_block("cross_attention_dim")[self.level],
            layers=cfg.per_block("transformer_layers_per_block")[self.level],
            groups=cfg.norm_num_groups,
            use_linear_projection=cfg.use_linear_projection,
            rngs=self.rngs,
        )


class UNet(nnx.Module):
    """Predicts the noise (or v) in latents at timestep t, given a text embedding.

    Args:
        cfg: the architecture.
        lora: where given, its target layers carry low-rank adapters (the LoRA teacher of method.md, step 8).
        remat: what the backward pass computes again, one of REMAT_POLICIES.
        replicated: a mesh with an axis `fsdp` has the parameters whole on every device: none is gathered.
    """

    def __init__(
        self,
        cfg: UNetConfig,
        *,
        lora: LoRAConfig | None = None,
        remat: str = "none",
        replicated: bool = False,
        rngs: nnx.Rngs,
    ):
        self.cfg, self.remat, self.replicated = cfg, remat, replicated
        widths, depths, heads = (
            cfg.block_out_channels,
            cfg.per_block("layers_per_block"),
            cfg.per_block("attention_head_dim"),
        )
        last = len(widths) - 1
        common = [_Common(cfg, level, rngs) for level in range(len(widths))]

        self.conv_in = layers.conv2d(cfg.in_channels, widths[0], rngs=rngs)
        self.time_embedding = layers.TimestepEmbedding(widths[0], 4 * widths[0], cfg.time_cond_proj_dim, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(
                    widths[max(i - 1, 0)],
                    widths[i],
                    depths[i],
                    heads[i] if kind == "CrossAttnDownBlock2D" else None,
                    common[i],
                    downsample=i < last,
                )
                for i, kind in enumerate(cfg.down_block_types)
            ]
        )
        self.mid_block = MidBlock(widths[last], heads[last], common[last])
        self.up_blocks = nnx.List(
            [
                UpBlock(
                    _up_inputs(widths, i, depths[i] + 1),
                    widths[i],
                    heads[i] if kind == "CrossAttnUpBlock2D" else None,
                    common[i],
                    upsample=i > 0,
                )
                for i, kind in zip(range(last, -1, -1), cfg.up_block_types, strict=True)
            ]
        )
        self.conv_norm_out = layers.GroupNorm(widths[0], cfg.norm_num_groups, cfg.norm_eps)
        self.conv_out = layers.conv2d(widths[0], cfg.out_channels, rngs=rngs)
        if lora is not None:
            adapt(self, lora, rngs=rngs)

    def encode(self, latents: jax.Array, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None) -> Features:
        """conv_in, down blocks and mid block: latents [b h w c], t [b], text [b l d] -> Features.

        `time_cond` [b p], here and below, goes into the time embedding of a UNet with a `time_cond_proj_dim` p.
        """
        temb, text = self._embed_time(t, time_cond), self._cast(text)
        h, run = self.conv_in(self._cast(latents)), _Run(self, latents)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = run(resnet, h, temb)
                if block.attentions:
                    h = run(block.attentions[i], h, text)
                skips.append(h)
            for downsampler in block.downsamplers:
                h = run(downsampler, h)
                skips.append(h)
        h = run(self.mid_block.resnets[0], h, temb)
        h = run(self.mid_block.attentions[0], h, text)
        h = run(self.mid_block.resnets[1], h, temb)
        return Features(h, tuple(skips))

    def decode(
        self, features: Features, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """Up blocks and output convolution: Features, t [b], text [b l d] -> predicted noise or v [b h w c]."""
        return self.decode_steps(features, t[:, None], text, time_cond)[:, 0]

    def decode_steps(
        self, features: Features, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """`decode` at every timestep of t [b k], with what they have in common done once (sharing.py): [b k h w c].

        Activations are [b*k h w c], see rows.py. `time_cond` [b p] is one for all timesteps.
        """
        b, k = t.shape
        temb = self._embed_time(rows.flatten(t), None if time_cond is None else rows.repeat(time_cond, b * k))
        h, skips, text = features.mid, list(features.skips), self._cast(text)
        run = _Run(self, skips[-1])
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = run(resnet, h, temb, skips.pop())
                if block.attentions:
                    h = run(block.attentions[i], h, text)
            for upsampler in block.upsamplers:
                # the next skip's size, which is not twice this one's where the latents' size is odd at some level
                _, height, width, _ = skips[-1].shape
                h = run(upsampler, h, call=functools.partial(_resize, size=(height, width)))
        outputs = run((self.conv_norm_out, self.conv_out), h, call=_output)
        return rows.unflatten(outputs, b)

    def __call__(
        self, latents: jax.Array, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """One plain diffusion step's network evaluation: latents [b h w c], t [b], text [b l d] -> [b h w c]."""
        return self.decode(self.encode(latents, t, text, time_cond), t, text, time_cond)

    def _embed_time(self, t: jax.Array, time_cond: jax.Array | None) -> jax.Array:
        cfg = self.cfg
        sinusoids = layers.timestep_embedding(t, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        embed = sharding.gathered(self.time_embedding)
        return embed(self._cast(sinusoids), None if time_cond is None else self._cast(time_cond))

    def _cast(self, x: jax.Array) -> jax.Array:
        return x.astype(functional.dtype_of(self.conv_in))


class _Run:
    """Runs a network's blocks one after the other, each gathered, and in the backward pass recomputed, by itself.

    Parameters are gathered while the block before runs, and no earlier: not before `after` is known, which goes into
    the block before the first, then what goes into the first, and so on.
    """

    def __init__(self, unet: UNet, after: jax.Array):
        self.remat, self.replicated, self.after = unet.remat, unet.replicated, after

    def __call__(
        self, block: Any, *args: jax.Array, call: Callable[..., jax.Array] = lambda block, *a: block(*a)
    ) -> jax.Array:
        """`call(block, *args)`."""
        run = call
        if not self.replicated:
            block, self.after = sharding.not_before(sharding.split_parameters(block), self.after), args[0]
            run = lambda block, *a: call(sharding.gathered(sharding.split_parameters(block)), *a)
        if self.remat != "none":
            run = functional.backward_in_turn(jax.checkpoint(run, policy=REMAT_POLICIES[self.remat]))
        return run(block, *args)


def _resize(upsampler: layers.Upsample2D, h: jax.Array, size: tuple[int, int]) -> jax.Array:
    return upsampler(h, size)


def _output(norm_and_conv: tuple[nnx.Module, nnx.Module], h: jax.Array) -> jax.Array:
    norm, conv = norm_and_conv
    return conv(nnx.silu(norm(h)))


def _up_inputs(widths: tuple[int, ...], level: int, depth: int) -> list[int]:
    """Input channels of an up block's ResNets: the stream coming up plus the skip, the last from the level above."""
    below, here, above = widths[min(level + 1, len(widths) - 1)], widths[level], widths[max(level - 1, 0)]
    streams = [below] + [here] * (depth - 1)
    skips = [here] * (depth - 1) + [above]
    return [stream + skip for stream, skip in zip(streams, skips, strict=True)]
