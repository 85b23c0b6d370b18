"""CLIP's text and image encoders (arXiv 2103.00020), with the tensor names of transformers' checkpoints.

The text encoder conditions Stable Diffusion. SD 1.x has that of OpenAI's ViT-L/14 with quick_gelu, and SD 2.x the first
23 layers of that of OpenCLIP's ViT-H/14 with gelu. The whole model scores images against prompts. Modules compute in
the dtype of their parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.checked_fields import Range, check_fields, check_others, one_of, read
from tiue_jax.models import attention, initial
from tiue_jax.models.functional import dtype_of
from tiue_jax.models.layers import layer_norm

T = TypeVar("T")


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of the GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nnx.gelu, approximate=False),
}

# Fields that transformers 4 wrote into every config and that do not change the output of an encoder: versions,
# initialisation, output format, labels, and the settings of text generation.
_IGNORED = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures dtype torch_dtype torchscript
    transformers_version use_bfloat16 initializer_factor initializer_range output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate finetuning_task id2label label2id problem_type prefix
    task_specific_params tf_legacy_loss tokenizer_class bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences remove_invalid_values repetition_penalty sep_token_id suppress_tokens temperature
    tie_encoder_decoder tie_word_embeddings top_k top_p typical_p
    """.split()
)

# Fields that change the network, each with its only supported value.
_FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "dropout": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}

# transformers 4 wrote these fields into the configs of models without tokens, too.
_TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


_Size = Annotated[int, Range(1, 65_536)]
_Depth = Annotated[int, Range(1, 128)]  # each layer takes time to build, before any weight is read
_Epsilon = Annotated[float, Range(0, 1, above_low=True)]
_Activation = Annotated[str, one_of(sorted(ACTIVATIONS))]
_TokenId = Annotated[int, Range(-1, 2**31 - 1)]


def _read(cls: type[T], d: Any, section: str, model_type: str) -> T:
    """Reads the JSON config `d`. ValueError if a field or value is not supported."""
    check_others(cls, d, section, {"model_type": model_type, **_FIXED}, ignored=_IGNORED | _TOKEN_IDS)
    return read(cls, d, section)


def _check_heads(cfg: "CLIPTextConfig | CLIPVisionConfig", section: str) -> None:
    """Raises ValueError unless the heads divide the width."""
    if cfg.hidden_size % cfg.num_attention_heads:
        raise ValueError(
            f"{section}.hidden_size must be a multiple of num_attention_heads, "
            f"got {cfg.hidden_size} and {cfg.num_attention_heads}"
        )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The configuration of a text encoder, with transformers' field names and defaults (those of ViT-B/32).

    The encoder does not read `bos_token_id`, `pad_token_id` and `projection_dim`. They are kept for the export.
    """

    vocab_size: Annotated[int, Range(1, 10_000_000)] = 49408
    hidden_size: _Size = 512
    intermediate_size: _Size = 2048
    num_hidden_layers: _Depth = 12
    num_attention_heads: _Size = 8
    max_position_embeddings: _Size = 77
    hidden_act: _Activation = "quick_gelu"
    layer_norm_eps: _Epsilon = 1e-5
    projection_dim: _Size = 512
    bos_token_id: _TokenId | None = 49406
    eos_token_id: Annotated[int, Range(0, 10_000_000)] = 49407
    pad_token_id: _TokenId | None = 1

    def __post_init__(self):
        check_fields(self, "text_encoder")
        _check_heads(self, "text_encoder")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(
                f"text_encoder.eos_token_id must be below vocab_size = {self.vocab_size}, got {self.eos_token_id}"
            )

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads transformers' `config.json`. Raises ValueError if a field or value is not supported."""
        return _read(cls, d, "text_encoder", "clip_text_model")

    def to_dict(self) -> dict:
        """The contents of transformers' `config.json`."""
        kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        # without a dtype, transformers would compute in that of the file: float16, for example, beside a float32 UNet
        return {**kind, "dtype": "float32", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The configuration of an image encoder (ViT), with transformers' field names and defaults (those of ViT-B/32)."""

    hidden_size: _Size = 768
    intermediate_size: _Size = 3072
    num_hidden_layers: _Depth = 12
    num_attention_heads: _Size = 12
    num_channels: _Size = 3
    image_size: _Size = 224
    patch_size: _Size = 32
    hidden_act: _Activation = "quick_gelu"
    layer_norm_eps: _Epsilon = 1e-5
    projection_dim: _Size = 512

    def __post_init__(self):
        check_fields(self, "image_encoder")
        _check_heads(self, "image_encoder")
        if self.patch_size > self.image_size:
            raise ValueError(f"image_encoder.patch_size must be <= {self.image_size}, got {self.patch_size}")

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads transformers' `config.json`. Raises ValueError if a field or value is not supported."""
        return _read(cls, d, "image_encoder", "clip_vision_model")

    def to_dict(self) -> dict:
        """The contents of transformers' `config.json`."""
        return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The configuration of both encoders, and the width of the space that they share."""

    text_config: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: _Size = 512
    logit_scale_init_value: float = 2.6592

    def __post_init__(self):
        check_fields(self, "clip")

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads transformers' nested `config.json`. Raises ValueError if a field or value is not supported.

        Older files have `text_config_dict` or `vision_config_dict`, too. They take precedence, as in transformers.
        """
        d = dict(d)
        for name, part in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            plain, older = d.pop(name, None), d.pop(f"{name}_dict", None)
            d[name] = part.from_dict((plain or {}) if older is None else older)
        return _read(cls, d, "clip", "clip")

    def to_dict(self) -> dict:
        """The contents of transformers' nested `config.json`."""
        parts = {"text_config": self.text_config.to_dict(), "vision_config": self.vision_config.to_dict()}
        for part in parts.values():
            del part["architectures"]
        d = {"architectures": ["CLIPModel"], "model_type": "clip", **parts}
        return d | {"projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}


class TextOutput(NamedTuple):
    """The output of the text encoder."""

    last_hidden_state: jax.Array  # [b l d], after the final layer norm, as Stable Diffusion uses it
    pooled: jax.Array  # [b d], at the end-of-text token


class VisionOutput(NamedTuple):
    """The output of the image encoder."""

    last_hidden_state: jax.Array  # [b 1+n d], class token first, before the last layer norm
    pooled: jax.Array  # [b d], the class token after the last layer norm


class CLIPAttention(nnx.Module):
    """Multi-head self-attention of x [b l d] -> [b l d]."""

    def __init__(self, dim: int, heads: int, *, is_causal: bool, rngs: nnx.Rngs):
        self.heads, self.is_causal = heads, is_causal
        self.q_proj = initial.linear(dim, dim, rngs=rngs)
        self.k_proj = initial.linear(dim, dim, rngs=rngs)
        self.v_proj = initial.linear(dim, dim, rngs=rngs)
        self.out_proj = initial.linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q = attention.project(self.q_proj, x, self.heads)
        k = attention.project(self.k_proj, x, self.heads)
        v = attention.project(self.v_proj, x, self.heads)
        return self.out_proj(attention.merge_heads(attention.attend(q, k, v, is_causal=self.is_causal)))


class CLIPMLP(nnx.Module):
    """Two-layer MLP: [b l d] -> [b l d]."""

    def __init__(self, dim: int, inner: int, hidden_act: str, *, rngs: nnx.Rngs):
        self.hidden_act = hidden_act
        self.fc1 = initial.linear(dim, inner, rngs=rngs)
        self.fc2 = initial.linear(inner, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Self-attention and MLP, pre-norm: [b l d] -> [b l d]."""

    def __init__(self, cfg: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, rngs: nnx.Rngs):
        dim = cfg.hidden_size
        self.layer_norm1 = layer_norm(dim, cfg.layer_norm_eps, rngs=rngs)
        self.self_attn = CLIPAttention(dim, cfg.num_attention_heads, is_causal=is_causal, rngs=rngs)
        self.layer_norm2 = layer_norm(dim, cfg.layer_norm_eps, rngs=rngs)
        self.mlp = CLIPMLP(dim, cfg.intermediate_size, cfg.hidden_act, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """A stack of layers: [b l d] -> [b l d]."""

    def __init__(self, cfg: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [CLIPEncoderLayer(cfg, is_causal=is_causal, rngs=rngs) for _ in range(cfg.num_hidden_layers)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextEmbeddings(nnx.Module):
    """Token and position embeddings: input_ids int [b l] -> [b l d].

    Raises:
        ValueError: there are more tokens than positions.
    """

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = initial.embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.position_embedding = initial.embed(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"input_ids must have at most max_position_embeddings = {limit} tokens, got {length}")
        # calling nnx.Embed would cast to the dtype in which it was built, not that of its parameters
        tokens = jnp.take(self.token_embedding.embedding[...], input_ids, axis=0)
        return tokens + self.position_embedding.embedding[...][None, :length]


class CLIPVisionEmbeddings(nnx.Module):
    """Embeddings of the class token, the patches and their positions: [b h w c] -> [b 1+n d].

    Raises:
        ValueError: images of another shape than the config's.
    """

    def __init__(self, cfg: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.image_shape = (cfg.image_size, cfg.image_size, cfg.num_channels)
        dim, patch = cfg.hidden_size, (cfg.patch_size, cfg.patch_size)
        self.class_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (dim,)))
        self.patch_embedding = initial.conv(
            cfg.num_channels, dim, patch, patch, padding="VALID", use_bias=False, rngs=rngs
        )
        self.position_embedding = initial.embed((cfg.image_size // cfg.patch_size) ** 2 + 1, dim, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        if pixel_values.shape[1:] != self.image_shape:
            expected, got = (" ".join(map(str, shape)) for shape in (self.image_shape, pixel_values.shape))
            raise ValueError(f"pixel_values must be [b {expected}], got [{got}]")
        patches = self.patch_embedding(pixel_values.astype(dtype_of(self.patch_embedding)))  # [b h/p w/p d]
        b, dim = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.class_embedding[...], (b, 1, dim))
        tokens = jnp.concatenate([first, patches.reshape(b, -1, dim)], axis=1)  # [b 1+n d]
        return tokens + self.position_embedding.embedding[...][None]


class CLIPTextTransformer(nnx.Module):
    """Causal transformer over tokens: input_ids int [b l] -> TextOutput."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.eos_token_id = cfg.eos_token_id
        self.embeddings = CLIPTextEmbeddings(cfg, rngs=rngs)
        self.encoder = CLIPEncoder(cfg, is_causal=True, rngs=rngs)
        self.final_layer_norm = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> TextOutput:
        hidden = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))
        # The pooled output is that at the first end of text, which may be repeated. Older configs say eos_token_id = 2,
        # which is wrong for CLIP's vocabulary. For them transformers takes the highest token id, the end of text.
        marks = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id)
        return TextOutput(hidden, hidden[jnp.arange(hidden.shape[0]), jnp.argmax(marks, axis=1)])


class CLIPVisionTransformer(nnx.Module):
    """ViT over patches: normalised pixels [b h w c] -> VisionOutput."""

    def __init__(self, cfg: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = CLIPVisionEmbeddings(cfg, rngs=rngs)
        self.pre_layrnorm = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)  # a misspelt name on disk
        self.encoder = CLIPEncoder(cfg, is_causal=False, rngs=rngs)
        self.post_layernorm = layer_norm(cfg.hidden_size, cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> VisionOutput:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return VisionOutput(hidden, self.post_layernorm(hidden[:, 0]))


class CLIPTextModel(nnx.Module):
    """The text encoder alone, as in a pipeline's `text_encoder` folder: input_ids int [b l] -> TextOutput."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(cfg, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> TextOutput:
        return self.text_model(input_ids)


class CLIPVisionModel(nnx.Module):
    """The image encoder alone: normalised pixels [b h w c] -> VisionOutput."""

    def __init__(self, cfg: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.vision_model = CLIPVisionTransformer(cfg, rngs=rngs)

    def __call__(self, pixel_values: jax.Array) -> VisionOutput:
        return self.vision_model(pixel_values)


class CLIPModel(nnx.Module):
    """Both encoders, with projections to a common space of width p. There the cosine scores an image against a text.

    Features are not normalised, like those of transformers' get_text_features and get_image_features. `logit_scale` is
    the logarithm of the inverse temperature of the contrastive loss.
    """

    def __init__(self, text_cfg: CLIPTextConfig, vision_cfg: CLIPVisionConfig, projection_dim: int, *, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(text_cfg, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision_cfg, rngs=rngs)
        self.text_projection = initial.linear(text_cfg.hidden_size, projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = initial.linear(vision_cfg.hidden_size, projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.array(math.log(1 / 0.07), jnp.float32))

    def text_features(self, input_ids: jax.Array) -> jax.Array:
        """Tokens int [b l] -> [b p]."""
        return self.text_projection(self.text_model(input_ids).pooled)

    def image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Pixels [b h w c], normalised with CLIP's mean and standard deviation -> [b p]."""
        return self.visual_projection(self.vision_model(pixel_values).pooled)
