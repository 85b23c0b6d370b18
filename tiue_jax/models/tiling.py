"""Decoding in overlapping tiles with blended seams: large images need only the memory of one tile.

The numerics are those of diffusers' AutoencoderKL.tiled_decode (enable_vae_tiling). The image differs from one that is
decoded in one piece, since norms and attention see one tile at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp

from tiue_jax.checked_fields import Range, check_fields


class Autoencoder(Protocol):
    """The part of an autoencoder's configuration that tiling reads."""

    @property
    def factor(self) -> int:
        """Pixels of the image for each latent, along each side."""

    @property
    def sample_size(self) -> int:
        """Height and width of the training images, in pixels."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The size and the overlap of tiles, with the names of diffusers' AutoencoderKL.

    Attributes:
        tile_sample_min_size: side of a tile in pixels. None is the size that the autoencoder was trained on. Images
            that are no larger are decoded in one piece.
        tile_overlap_factor: the fraction of a tile that overlaps the next tile; at least 0 and below 1.
    """

    tile_sample_min_size: Annotated[int, Range(1, 65_536)] | None = None
    tile_overlap_factor: Annotated[float, Range(0, 1, below_high=True)] = 0.25

    def __post_init__(self) -> None:
        check_fields(self)

    def cut(self, cfg: Autoencoder) -> tuple[int, int, int]:
        """The side of a tile and the distance to the next tile, both in latents, and the width of a seam in pixels.

        Raises:
            ValueError: a tile is smaller than one latent, or tiles do not fit together. In that case diffusers would
                leave out or repeat rows of the image.
        """
        pixels = self.tile_sample_min_size or cfg.sample_size
        side = pixels // cfg.factor
        stride, seam = int(side * (1 - self.tile_overlap_factor)), int(pixels * self.tile_overlap_factor)
        if stride < 1 or stride * cfg.factor != pixels - seam:
            raise ValueError(
                f"tile_sample_min_size {pixels} and tile_overlap_factor {self.tile_overlap_factor}: the tile and its "
                f"overlap must be whole latents of {cfg.factor} pixels"
            )
        return side, stride, seam


def tiled_decode(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, cfg: Autoencoder, tiling: Tiling
) -> jax.Array:
    """Decodes latents [b h w c] tile by tile -> [b fh fw 3]; in one piece if they are no larger than one tile.

    Tiles of the same shape share one `lax.map`, so `decode` is compiled once for each shape. There are up to four: the
    inner tiles, and those that the right edge, the lower edge, or both cut off.

    Args:
        decode: the decoder of an autoencoder, [b h w c] -> [b fh fw 3].
        latents: unscaled.
        cfg: the configuration of the autoencoder.
        tiling: the size and the overlap of tiles.

    Raises:
        ValueError: as `Tiling.cut`.
    """
    side, stride, seam = tiling.cut(cfg)
    height, width = latents.shape[1:3]
    if height <= side and width <= side:
        return decode(latents)
    rows, columns = range(0, height, stride), range(0, width, stride)
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y in rows:
        for x in columns:
            by_shape.setdefault((min(side, height - y), min(side, width - x)), []).append((y, x))
    tiles: dict[tuple[int, int], jax.Array] = {}
    for (h, w), corners in by_shape.items():
        decoded = jax.lax.map(decode, jnp.stack([latents[:, y : y + h, x : x + w] for y, x in corners]))
        tiles |= zip(corners, decoded, strict=True)
    kept = stride * cfg.factor
    lines = []
    for y in rows:
        for x in columns:
            if y > 0:
                tiles[y, x] = _blend(tiles[y - stride, x], tiles[y, x], seam, axis=1)
            if x > 0:
                tiles[y, x] = _blend(tiles[y, x - stride], tiles[y, x], seam, axis=2)
        lines.append(jnp.concatenate([tiles[y, x][:, :kept, :kept] for x in columns], axis=2))
    return jnp.concatenate(lines, axis=1)


def _blend(before: jax.Array, tile: jax.Array, seam: int, axis: int) -> jax.Array:
    """The tile, whose first `seam` rows along the axis fade from the last rows of the tile before it."""
    seam = min(before.shape[axis], tile.shape[axis], seam)
    if seam == 0:
        return tile

    def cut(x: jax.Array, start: int, stop: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, start, stop, axis=axis)

    size = before.shape[axis]
    ramp = (jnp.arange(seam, dtype=tile.dtype) / seam).reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    faded = cut(before, size - seam, size) * (1 - ramp) + cut(tile, 0, seam) * ramp
    return jnp.concatenate([faded, cut(tile, seam, tile.shape[axis])], axis=axis)
