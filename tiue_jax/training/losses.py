"""The losses of TiUE's distillation (arXiv 2505.21960), as functions from arrays to a float32 scalar and metrics.

No network is called here, and nothing but jax and numpy is imported. Shapes: b batch, k timesteps, h w c latents, p the
width of CLIP's shared space. All reductions are in float32 for every dtype of the arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np

Loss = tuple[jax.Array, dict[str, jax.Array]]

TIMESTEP_WEIGHTINGS = ("one_minus_alphas_cumprod", "uniform")

# openai/clip-vit-base-patch32, preprocessor_config.json
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def timestep_weight(weighting: str, sqrt_one_minus_alphas_cumprod: jax.Array) -> jax.Array:
    """The weight of each sample's timestep in L_vsd: 1 - abar_t, or 1 if `weighting` is "uniform".

    Args:
        weighting: one of TIMESTEP_WEIGHTINGS.
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar_t), of any shape, which the result has too.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting == "one_minus_alphas_cumprod":
        return jnp.square(sqrt_one_minus_alphas_cumprod)
    if weighting == "uniform":
        return jnp.ones_like(sqrt_one_minus_alphas_cumprod)
    raise ValueError(f"timestep_weighting must be one of {TIMESTEP_WEIGHTINGS}, got {weighting!r}")


def vsd(latents: jax.Array, teacher: jax.Array, lora: jax.Array, weight: jax.Array) -> Loss:
    """Variational score distillation: 0.5 mean((z_0 - stopgrad(z_0 - g))^2) with g = weight (e_teacher - e_lora).

    The gradient with respect to z_0 is g over the number of elements. Elements of g that are not finite count as 0, so
    that a sample that overflows in a teacher does not spoil the loss of the others. `vsd_nonfinite` is their share.
    The reference's nan_to_num makes infinities the largest float32, whose square is infinite.

    Args:
        latents: the student's z_0 [b h w c].
        teacher: guided noise prediction of the teacher [b h w c].
        lora: guided noise prediction of the LoRA teacher [b h w c].
        weight: see `timestep_weight` [b 1 1 1].
    """
    latents, teacher, lora = (x.astype(jnp.float32) for x in (latents, teacher, lora))
    direction = weight * (teacher - lora)
    gradient = jnp.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)
    target = jax.lax.stop_gradient(latents - gradient)
    loss = 0.5 * jnp.mean(jnp.square(latents - target))
    return loss, {"loss_vsd": loss, "vsd_nonfinite": jnp.mean(~jnp.isfinite(direction), dtype=jnp.float32)}


def kl(epsilons: jax.Array, batch_size: float = 8) -> Loss:
    """KL(N(mu, v) || N(0, 1)) of each decoder output [b k h w c], summed over k, its mean over b times `batch_size`.

    mu and v are the mean and the unbiased variance over all elements of one output of one sample. The reference sums
    over a per-device batch of 8. A mean times 8 is the same number there, and no other batch size or number of devices
    changes the loss's strength against L_vsd, which is a mean.
    """
    epsilons = epsilons.astype(jnp.float32)
    mean = jnp.mean(epsilons, axis=(2, 3, 4))  # [b k]
    var = jnp.var(epsilons, axis=(2, 3, 4), ddof=1)
    divergence = 0.5 * (jnp.square(mean) + var - 1 - jnp.log(var))
    loss = batch_size * jnp.mean(jnp.sum(divergence, axis=1))
    return loss, {"loss_kl": loss}


def clip(
    text_features: jax.Array,
    image_features: jax.Array,
    threshold: float = 0.35,
    whole_similarity: jax.Array | None = None,
) -> Loss:
    """relu(threshold - mean cosine similarity) of CLIP's projected features.

    Args:
        text_features: of the prompts [b p], not normalised.
        image_features: of the images [b p], not normalised.
        threshold: the similarity above which the loss is 0.
        whole_similarity: for a micro-batch, the mean similarity of the whole batch. It then decides if the loss is 0.
            So the mean of the micro-batches' losses and gradients is the loss and the gradient of the whole batch.
    """
    text, image = (x.astype(jnp.float32) for x in (text_features, image_features))
    norms = jnp.linalg.norm(text, axis=-1) * jnp.linalg.norm(image, axis=-1)
    similarity = jnp.mean(jnp.sum(text * image, axis=-1) / jnp.maximum(norms, 1e-8))
    whole = similarity if whole_similarity is None else whole_similarity
    loss = jnp.where(whole < threshold, threshold - similarity, 0.0)
    return loss, {"loss_clip": loss, "clip_similarity": similarity}


def clip_pixels(images: jax.Array, size: int, normalize: bool = True) -> jax.Array:
    """Images [b h w 3] in [-1, 1] as inputs of CLIP's image tower, float32 [b size size 3].

    They are resized by a bicubic filter with Keys' a = -0.5, with antialiasing if they shrink: the filter of CLIP's PIL
    preprocessing. PyTorch's `interpolate(mode="bicubic")`, which the reference uses, has a = -0.75 and by default no
    antialiasing, so its pixels differ. With `normalize`, CLIP's mean and standard deviation are applied. The reference
    does not apply them, but CLIP was trained with them.
    """
    images = (images.astype(jnp.float32) + 1) / 2
    images = jax.image.resize(images, (images.shape[0], size, size, 3), "bicubic")
    if normalize:
        images = (images - CLIP_MEAN[None, None, None]) / CLIP_STD[None, None, None]
    return images


def lora(prediction: jax.Array, noise: jax.Array, sqrt_alphas_cumprod: jax.Array) -> Loss:
    """The LoRA teacher's denoising loss, mean((sqrt(abar_t) (e_lora - n))^2).

    Args:
        prediction: the noise prediction e_lora [b h w c].
        noise: the noise n in the noisy latents [b h w c].
        sqrt_alphas_cumprod: sqrt(abar_t) [b 1 1 1].
    """
    error = sqrt_alphas_cumprod * (prediction.astype(jnp.float32) - noise.astype(jnp.float32))
    loss = jnp.mean(jnp.square(error))
    return loss, {"loss_lora": loss}
