"""Metrics of images and their prompts in the space of a CLIP model, and of the images of one prompt."""

import numpy as np

from tiue_jax.evaluate.estimate import Estimate, of_mean

INCEPTION_SPLITS = 10
_SHUFFLE_SEED = 2020


def cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The cosine of each image [n d] and its text [n d]: float64 [n]. Its mean is the CLIP score (arXiv 2104.08718)."""
    return np.einsum("nd,nd->n", unit(images), unit(texts))


def retrieval(images: np.ndarray, texts: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Estimate:
    """Retrieval@1: the share of images whose nearest text, among those of all prompts, is that of their prompt.

    Args:
        images: image features [n d].
        texts: text features of the distinct prompts [p d].
        prompts: for each image, the number of its prompt: int [n].
        seed: of the bootstrap.
    """
    return of_mean((unit(images) @ unit(texts).T).argmax(1) == prompts, seed, groups=prompts)


def diversity(features: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Estimate:
    """In-prompt diversity: the mean cosine distance between pairs of images of the same prompt, averaged over prompts.

    Args:
        features: [n d].
        prompts: for each image, the number of its prompt: int [n].
        seed: of the bootstrap, over prompts.

    Raises:
        ValueError: no prompt has two images.
    """
    means = []
    for prompt in np.unique(prompts):
        x = unit(features[prompts == prompt])
        if len(x) > 1:
            cosine = x @ x.T
            pairs = len(x) * (len(x) - 1)
            means.append(1 - (cosine.sum() - np.trace(cosine)) / pairs)
    if not means:
        raise ValueError("in-prompt diversity needs at least 2 images of a prompt, got 1 of each")
    return of_mean(np.array(means), seed)


def inception_score(logits: np.ndarray, seed: int = 0) -> Estimate:
    """The inception score of class scores [n c] (arXiv 1606.03498): the mean over 10 splits.

    The score of a split is exp(mean KL(p(class | image) || p(class))). Images are shuffled as in torch-fidelity.

    Raises:
        ValueError: there are fewer images than splits.
    """
    if len(logits) < INCEPTION_SPLITS:
        raise ValueError(f"the inception score needs at least {INCEPTION_SPLITS} images, got {len(logits)}")
    scores = []
    n = len(logits)
    logits = logits[np.random.RandomState(_SHUFFLE_SEED).permutation(n)]
    for i in range(INCEPTION_SPLITS):
        part = np.asarray(logits[i * n // INCEPTION_SPLITS : (i + 1) * n // INCEPTION_SPLITS], np.float64)
        log_p = part - part.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        kl = (p * (log_p - np.log(p.mean(0))[None])).sum(1)
        scores.append(np.exp(kl.mean()))
    return of_mean(np.array(scores), seed)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of x [n d] divided by their norms, float64."""
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
