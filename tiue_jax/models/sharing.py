"""Exact sharing: work of the decoder that is equal at all timesteps is done once (docs/method.md, section 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.models import rows
from tiue_jax.models.convolution import convolve_unrounded
from tiue_jax.models.layers import ResnetBlock2D


class SkipResnetBlock2D(ResnetBlock2D):
    """A ResNet block on concat([h, skip]), where h depends on the timestep and skip does not.

    The block computes

        y = conv2(act(norm2(u + temb))) + shortcut(x)  with  u = conv1(act(norm1(x)))  and  x = concat([h, skip])

    along the channels. At k timesteps h and temb have b*k rows, and skip has b rows. Three functions read x, and each
    can be split along the channels of x:

    - norm1 has statistics for each group of channels. Groups that lie wholly in skip have the same statistics at all
      timesteps. Their channels, those from `border` on, are normalised and activated once. A group with channels of
      both has statistics that depend on h, so its channels of skip are repeated k times and computed with h.
    - conv1 is linear, a sum over input channels:  u = conv(z[:border], W[:border]) + conv(z[border:], W[border:])  with
      z = act(norm1(x)). The second term is computed for b rows and added at all k timesteps.
    - The 1x1 shortcut is linear and reads x without a norm. It is split between h and skip.

    In the first block of the decoder h does not depend on the timestep and has b rows. There `begin` is computed for b
    rows without a split. This is also best at k = 1. The two terms are added in float32 and rounded once, as in the
    convolution of the whole, so bfloat16 loses no precision.
    """

    def __call__(self, h: jax.Array, temb: jax.Array, skip: jax.Array) -> jax.Array:  # type: ignore[override]
        """h [b*k h w c] or [b h w c], temb [b*k d], skip [b h w c'] -> [b*k h w cout]."""
        if h.shape[0] == skip.shape[0]:
            return self.finish(*self.begin(jnp.concatenate([h, skip], axis=-1)), temb)
        assert self.conv_shortcut is not None  # the concatenation has more channels than the output
        h_channels = h.shape[-1]
        border = -(-h_channels // self.norm1.group_size) * self.norm1.group_size
        mixed = jnp.concatenate([h, rows.repeat(skip[..., : border - h_channels], h.shape[0])], axis=-1)
        alone = skip[..., border - h_channels :]
        mixed, alone = nnx.silu(self.norm1(mixed)), nnx.silu(self.norm1(alone, start=border))
        hidden = self.conv1.linear(lambda kernel: _split_convolve(mixed, alone, kernel))
        residual = self.conv_shortcut.linear(lambda kernel: _split_convolve(h, skip, kernel))
        return self.finish(hidden, residual, temb)


def _split_convolve(x: jax.Array, shared: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of concat([x, shared]), with that of `shared` computed once.

    x [b*k h w c], shared [b h w c'], kernel [kh kw c+c' d] -> float32 [b*k h w d].
    """
    channels = x.shape[-1]
    kernel_of_x, kernel_of_shared = kernel[:, :, :channels], kernel[:, :, channels:]
    return rows.add(convolve_unrounded(x, kernel_of_x), convolve_unrounded(shared, kernel_of_shared))
