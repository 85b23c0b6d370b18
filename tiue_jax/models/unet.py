"""The Stable Diffusion UNet in two parts, `encode` and `decode`; names and numerics of diffusers' UNet2DConditionModel.

TiUE (arXiv 2505.21960) runs `encode` once and `decode` at several timesteps. A plain diffusion step runs each once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import jax
from flax import nnx

from tiue_jax import sharding
from tiue_jax.checked_fields import Items, Range, check_fields, check_others, one_of, read
from tiue_jax.models import attention, functional, layers, rows
from tiue_jax.models.convolution import Conv
from tiue_jax.models.layer_by_layer import LayerByLayer
from tiue_jax.models.lora import LoRAConfig, adapt
from tiue_jax.models.sharing import SkipResnetBlock2D

# Fields that diffusers' EMAModel adds to the config of a moving average. The model does not depend on them.
_EMA_FIELDS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
_CLASS = "UNet2DConditionModel"
# Fields of UNet2DConditionModel for which only one value is supported, with that value.
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
# Activations of each layer that are kept for the backward pass. The others are computed again.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # all, without jax.checkpoint
    "full": jax.checkpoint_policies.nothing_saveable,  # the inputs of the layer
    # also the inputs of the attentions and of the MLP in transformer blocks
    "streams": jax.checkpoint_policies.save_only_these_names(layers.STREAM),
    # also the outputs of the attentions
    "attention": jax.checkpoint_policies.save_only_these_names(layers.STREAM, attention.OUTPUT),
}
_DownBlock = Annotated[str, one_of(("CrossAttnDownBlock2D", "DownBlock2D"))]
_UpBlock = Annotated[str, one_of(("CrossAttnUpBlock2D", "UpBlock2D"))]
_Size = Annotated[int, Range(1, 65_536)]
_Depth = Annotated[int, Range(1, 64)]  # layers of a block; each takes time to build, before any weight is read
_MOST_LAYERS = 1000
_NUMBERS_OR_ONE_PER_BLOCK = (
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' `unet/config.json` that SD 1.x and 2.x use; the defaults are those of SD 1.5.

    `attention_head_dim` is the number of heads, for all blocks or for each block; the name is a mistake of diffusers.
    `upcast_attention` asks for float32 attention logits. This UNet always computes them in float32.
    """

    sample_size: _Size | tuple[_Size, _Size] | None = 64  # of the latents; two numbers are height and width
    in_channels: _Size = 4
    out_channels: _Size = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, one_of((0, 1))] = 0
    down_block_types: tuple[_DownBlock, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[_UpBlock, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: Annotated[tuple[_Size, ...], Items(1, 16)] = (320, 640, 1280, 1280)
    layers_per_block: _Depth | tuple[_Depth, ...] = 2
    downsample_padding: Annotated[int, one_of((0, 1))] = 1
    norm_num_groups: _Size = 32
    norm_eps: Annotated[float, Range(0, 1, above_low=True)] = 1e-5
    cross_attention_dim: _Size | tuple[_Size, ...] = 768
    transformer_layers_per_block: _Depth | tuple[_Depth, ...] = 1
    attention_head_dim: _Size | tuple[_Size, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    time_cond_proj_dim: _Size | None = None  # width of the guidance embedding of latent consistency models

    def __post_init__(self):
        check_fields(self, "unet")
        n = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"unet.{name} must have one entry per block ({n}), got {list(getattr(self, name))}")
        for name in _NUMBERS_OR_ONE_PER_BLOCK:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise ValueError(f"unet.{name} must be a number or one per block ({n}), got {list(value)}")

        depths = zip(self.per_block("layers_per_block"), self.per_block("transformer_layers_per_block"), strict=True)
        if (total := sum(depth * (1 + inner) for depth, inner in depths)) > _MOST_LAYERS:
            product = "layers_per_block x transformer_layers_per_block"
            raise ValueError(f"unet.{product} must make at most {_MOST_LAYERS} layers, got {total}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a diffusers config.

        Raises:
            ValueError: a field or a value that this UNet does not support, or fields that contradict each other.
        """
        fixed = {"_class_name": _CLASS, **_FIXED}
        notes = [name for name in config if name.startswith("_") and name != "_class_name"]
        check_others(cls, config, "unet", fixed, ignored=(*notes, *_EMA_FIELDS))
        return read(cls, config, "unet")

    def to_dict(self) -> dict[str, Any]:
        """The diffusers config, loadable by UNet2DConditionModel."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": _CLASS, **fields}

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Height and width of the latents that the UNet was trained on. None if the config does not say it."""
        size = self.sample_size
        return (size, size) if isinstance(size, int) else size

    def per_block(self, name: str) -> tuple[int, ...]:
        """The values of a field for each block, if the config gives one for all blocks or one for each."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class Features(NamedTuple):
    """The output of the encoder, which the decoder reads at every timestep."""

    mid: jax.Array  # [b h/2^n w/2^n c], the output of the mid block
    skips: tuple[jax.Array, ...]  # in the order in which they were computed, each [b h w c] at the size of its level


class DownBlock(nnx.Module):
    """ResNets, each followed by a transformer if the block has `heads`, then a downsampler."""

    def __init__(self, cin: int, cout: int, depth: int, heads: int | None, build: "_Build", *, downsample: bool):
        self.resnets = nnx.List([build.resnet(cin if i == 0 else cout, cout) for i in range(depth)])
        self.attentions = nnx.List([build.transformer(cout, heads) for _ in range(depth)] if heads else [])
        down = [layers.Downsample2D(cout, padding=build.cfg.downsample_padding, rngs=build.rngs)]
        self.downsamplers = nnx.List(down if downsample else [])

    def __call__(self, run: LayerByLayer, h: jax.Array, temb: jax.Array, text: jax.Array) -> list[jax.Array]:
        """h [b h w cin], temb [b d], text [b l d] -> the block's skips. The last one is also its output."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, h, temb)
            if self.attentions:
                h = run(self.attentions[i], h, text)
            skips.append(h)
        for downsampler in self.downsamplers:
            h = run(downsampler, h)
            skips.append(h)
        return skips


class MidBlock(nnx.Module):
    """ResNet, transformer, ResNet at the lowest resolution."""

    def __init__(self, channels: int, heads: int, build: "_Build"):
        self.resnets = nnx.List([build.resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([build.transformer(channels, heads)])

    def __call__(self, run: LayerByLayer, h: jax.Array, temb: jax.Array, text: jax.Array) -> jax.Array:
        """h [b h w c], temb [b d], text [b l d] -> [b h w c]."""
        h = run(self.resnets[0], h, temb)
        h = run(self.attentions[0], h, text)
        return run(self.resnets[1], h, temb)


class UpBlock(nnx.Module):
    """ResNets on concat([h, skip]), each followed by a transformer if the block has `heads`, then an upsampler."""

    def __init__(self, cins: list[int], cout: int, heads: int | None, build: "_Build", *, upsample: bool):
        self.resnets = nnx.List([build.resnet(cin, cout, SkipResnetBlock2D) for cin in cins])
        self.attentions = nnx.List([build.transformer(cout, heads) for _ in cins] if heads else [])
        self.upsamplers = nnx.List([layers.Upsample2D(cout, rngs=build.rngs)] if upsample else [])

    def __call__(
        self, run: LayerByLayer, h: jax.Array, skips: list[jax.Array], temb: jax.Array, text: jax.Array
    ) -> jax.Array:
        """Takes one skip for each ResNet from the end of `skips`.

        h [b h w c] or [b*k h w c], skips [b h w c'], temb [b*k d], text [b l d] -> [b*k h w cout], see rows.py.
        """
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, h, temb, skips.pop())
            if self.attentions:
                h = run(self.attentions[i], h, text)
        for upsampler in self.upsamplers:
            # the size of the next skip: if the size of the latents is odd at some level, it is not twice that of h
            _, height, width, _ = skips[-1].shape
            h = run(upsampler, h, size=(height, width))
        return h


class _Output(NamedTuple):
    """The last layers of the UNet, as one."""

    norm: layers.GroupNorm
    conv: Conv

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.conv(nnx.silu(self.norm(h)))


class _Build:
    """Builds the layers of one level of the UNet."""

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
        lora: adds low-rank adapters to the layers that it names (the LoRA teacher; docs/method.md, section 3, step 8).
        remat: which activations the backward pass computes again, one of REMAT_POLICIES.
        replicated: every device of a mesh holds all parameters, whatever the size of the axis `fsdp`.
        replicate_below: parameters of fewer elements are not sharded over `fsdp` (sharding.parameter_spec).
    """

    def __init__(
        self,
        cfg: UNetConfig,
        *,
        lora: LoRAConfig | None = None,
        remat: str = "none",
        replicated: bool = False,
        replicate_below: int = sharding.REPLICATE_BELOW,
        rngs: nnx.Rngs,
    ):
        self.cfg, self.remat = cfg, remat
        self.replicated, self.replicate_below = replicated, replicate_below
        widths = cfg.block_out_channels
        depths = cfg.per_block("layers_per_block")
        heads = cfg.per_block("attention_head_dim")
        last = len(widths) - 1
        build = [_Build(cfg, level, rngs) for level in range(len(widths))]

        self.conv_in = layers.conv2d(cfg.in_channels, widths[0], rngs=rngs)
        self.time_embedding = layers.TimestepEmbedding(widths[0], 4 * widths[0], cfg.time_cond_proj_dim, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(
                    widths[max(i - 1, 0)],
                    widths[i],
                    depths[i],
                    heads[i] if kind == "CrossAttnDownBlock2D" else None,
                    build[i],
                    downsample=i < last,
                )
                for i, kind in enumerate(cfg.down_block_types)
            ]
        )
        self.mid_block = MidBlock(widths[last], heads[last], build[last])
        self.up_blocks = nnx.List(
            [
                UpBlock(
                    _up_inputs(widths, i, depths[i] + 1),
                    widths[i],
                    heads[i] if kind == "CrossAttnUpBlock2D" else None,
                    build[i],
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
        """The input convolution, the down blocks and the mid block.

        latents [b h w c], t [b], text [b l d] -> Features. `time_cond` [b p], here and below, is added to the time
        embedding of a UNet whose `time_cond_proj_dim` is p.
        """
        run = self._layer_by_layer(after=latents)
        temb = self._embed_time(t, time_cond)
        text = self._cast(text)
        h = self.conv_in(self._cast(latents))
        skips = [h]
        for block in self.down_blocks:
            skips += block(run, skips[-1], temb, text)
        mid = self.mid_block(run, skips[-1], temb, text)
        return Features(mid, tuple(skips))

    def decode(
        self, features: Features, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """The up blocks and the output: Features, t [b], text [b l d] -> predicted noise or v [b h w c]."""
        return self.decode_steps(features, t[:, None], text, time_cond)[:, 0]

    def decode_steps(
        self, features: Features, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """`decode` at each timestep of t [b k] -> [b k h w c]. Work that is equal at all timesteps is done once.

        Activations are [b*k h w c] (rows.py); sharing.py derives what is equal. `time_cond` [b p] is the same at all
        timesteps.
        """
        b, k = t.shape
        run = self._layer_by_layer(after=features.skips[-1])
        temb = self._embed_time(rows.flatten(t), None if time_cond is None else rows.repeat(time_cond, b * k))
        text = self._cast(text)
        h = features.mid
        skips = list(features.skips)
        for block in self.up_blocks:
            h = block(run, h, skips, temb, text)
        outputs = run(_Output(self.conv_norm_out, self.conv_out), h)
        return rows.unflatten(outputs, b)

    def __call__(
        self, latents: jax.Array, t: jax.Array, text: jax.Array, time_cond: jax.Array | None = None
    ) -> jax.Array:
        """Encodes and decodes at one timestep: latents [b h w c], t [b], text [b l d] -> noise or v [b h w c]."""
        return self.decode(self.encode(latents, t, text, time_cond), t, text, time_cond)

    def _layer_by_layer(self, after: jax.Array) -> LayerByLayer:
        return LayerByLayer(
            after,
            remat_policy=REMAT_POLICIES[self.remat],
            replicated=self.replicated,
            replicate_below=self.replicate_below,
        )

    def _embed_time(self, t: jax.Array, time_cond: jax.Array | None) -> jax.Array:
        cfg = self.cfg
        sinusoids = layers.timestep_embedding(t, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        embed = sharding.gathered(self.time_embedding)
        return embed(self._cast(sinusoids), None if time_cond is None else self._cast(time_cond))

    def _cast(self, x: jax.Array) -> jax.Array:
        return x.astype(functional.dtype_of(self.conv_in))


def _up_inputs(widths: tuple[int, ...], level: int, depth: int) -> list[int]:
    """The input channels of an up block's ResNets, each of which reads concat([h, skip]).

    The first h comes from the level below, and the last skip from the level above.
    """
    below = widths[min(level + 1, len(widths) - 1)]
    here = widths[level]
    above = widths[max(level - 1, 0)]
    h_channels = [below] + [here] * (depth - 1)
    skip_channels = [here] * (depth - 1) + [above]
    return [h + skip for h, skip in zip(h_channels, skip_channels, strict=True)]
