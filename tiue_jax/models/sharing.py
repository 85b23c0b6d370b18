"""Exact sharing: what the decoder does at several timesteps without seeing the timestep, done once."""

import jax
import jax.numpy as jnp
from flax import nnx

from tiue_jax.models import rows
from tiue_jax.models.convolution import convolve_unrounded
from tiue_jax.models.layers import ResnetBlock2D


class SkipResnetBlock2D(ResnetBlock2D):
    """A ResNet block on concat([h, skip]), where only h has seen the timesteps.

    The block is  y = conv2(act(norm2(u + temb))) + shortcut(x)  with  u = conv1(act(norm1(x)))  and  x = concat([h,
    skip])  along the channels. At k timesteps h and temb have b*k rows, and skip has b. It comes in through three maps,
    and each falls apart along the channels of x:

    - norm1 has statistics for each group of channels. Groups that lie wholly in skip have the same ones at every
      timestep: their channels, from `border` on, are normalised and activated once. A group that straddles the two has
      statistics that h changes, so its channels of skip go with h, repeated k times.
    - conv1 is linear, a sum over input channels:  u = conv(z[:border], W[:border]) + conv(z[border:], W[border:]),
      where z = act(norm1(x)). The second term is computed for b rows and added to all k.
    - the 1x1 shortcut is linear too, and sees no norm: it is split where h ends.

    Before the first of these blocks no timestep has come in at all: there h has b rows as well, and `begin` is computed
    once as it stands. The same is the best way at k = 1. Terms are added in float32 and rounded once, as a convolution
    of the whole is: in bfloat16 nothing is rounded that would not have been.
    """

    def __call__(self, h: jax.Array, temb: jax.Array, skip: jax.Array) -> jax.Array:  # type: ignore[override]
        """h [b*k h w c] or [b h w c], temb [b*k d], skip [b h w c'] -> [b*k h w cout]."""
        if h.shape[0] == skip.shape[0]:
            return self.finish(*self.begin(jnp.concatenate([h, skip], axis=-1)), temb)
        assert self.conv_shortcut is not None  # a concatenation is wider than what comes out
        streams = h.shape[-1]
        border = -(-streams // self.norm1.group_size) * self.norm1.group_size
        mixed = jnp.concatenate([h, rows.repeat(skip[..., : border - streams], h.shape[0])], axis=-1)
        alone = skip[..., border - streams :]
        mixed, alone = nnx.silu(self.norm1(mixed)), nnx.silu(self.norm1(alone, start=border))
        hidden = self.conv1.linear(lambda kernel: _split_convolve(mixed, alone, kernel))
        residual = self.conv_shortcut.linear(lambda kernel: _split_convolve(h, skip, kernel))
        return self.finish(hidden, residual, temb)


def _split_convolve(x: jax.Array, shared: jax.Array, kernel: jax.Array) -> jax.Array:
    """concat([x, shared]) by the kernel: x [b*k h w c], shared [b h w c'], [kh kw c+c' d] -> float32 [b*k h w d]."""
    channels = x.shape[-1]
    own, once = kernel[:, :, :channels], kernel[:, :, channels:]
    return rows.add(convolve_unrounded(x, own), convolve_unrounded(shared, once))
