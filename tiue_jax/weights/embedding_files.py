"""Reads textual inversion embeddings (arXiv 2208.01618): trained vectors that stand for a token in prompts."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiue_jax.files import expand
from tiue_jax.weights import diagnosis, lora_source
from tiue_jax.weights.tensor_files import StoredTensor, open_file, read_metadata

EMBEDDING = lora_source.Kind("textual inversion embedding", ("learned_embeds.safetensors",))
_A1111 = (
    "emb_params"  # the tensor's name in a file of A1111's web UI or kohya's scripts, where the file names the token
)
_XL = {"clip_l", "clip_g"}  # the tensors' names in a file for Stable Diffusion XL, one for each text encoder
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONVERT = (
    "import torch, safetensors.torch as s; x = torch.load('{source}', weights_only=True); "
    "x = x.get('string_to_param', x); "
    "s.save_file({{k if k != '*' else 'emb_params': v.detach().contiguous() for k, v in x.items()}}, '{target}')"
)


class Embedding(NamedTuple):
    """A token, its trained vectors float32 [n d], and the file that they are from."""

    token: str
    vectors: np.ndarray
    path: Path

    @property
    def tokens(self) -> list[str]:
        """The token of each vector, with diffusers' names: `<cat>`, `<cat>_1`, `<cat>_2`."""
        return [self.token, *(f"{self.token}_{i}" for i in range(1, len(self.vectors)))]


def read(given: str | Path) -> Embedding:
    """Reads an embedding, after a download if necessary.

    Layouts: diffusers' `{token: [d] or [n d]}`, and A1111's `{"emb_params": [n d]}`. In the second, the token is the
    `name` in the metadata of the file, if it has one.

    Args:
        given: a name for lora_source.resolve, or "TOKEN=NAME" to give the token. That token replaces the file's.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ValueError: the file is a pickle, has another layout, or names no token; or a value is not finite.
    """
    token, name = _split(given)
    if str(name).lower().endswith(lora_source.PICKLES):
        target = f"{Path(name).stem}.safetensors"
        command = _CONVERT.format(source=name, target=target)
        message = f"{name}: a pickle, which can run code when it is read: convert it with PyTorch where you trust it"
        raise ValueError(diagnosis.shortened(f'{message}: python -c "{command}"'))
    path = lora_source.resolve(name, EMBEDDING)
    tensors = open_file(path)
    if found := sorted(_XL & tensors.keys()):
        kind = "a textual inversion embedding for Stable Diffusion XL"
        raise ValueError(f"{path}: this is {kind} ({', '.join(found)}), expected one for Stable Diffusion 1.x or 2.x")
    if len(tensors) != 1:
        expected = "expected one tensor, the embedding of one token"
        raise ValueError(diagnosis.misfit(f"{path}: {expected}", {"tensors": tensors}, diagnosis.kind_of(tensors)))
    ((key, tensor),) = tensors.items()
    vectors = _vectors(path, key, tensor)
    if token is None:
        token = read_metadata(path).get("name") if key == _A1111 else key
    if not token:
        raise ValueError(f"{path}: names no token, give it as {path.stem}={name}, and use {path.stem} in prompts")
    return Embedding(token, vectors, path)


def _split(given: str | Path) -> tuple[str | None, str | Path]:
    """The token, if one is given, and the name. A name that exists on this disk may contain a "="."""
    token, equals, name = str(given).partition("=")
    if isinstance(given, Path) or not equals or expand(given).exists():
        return None, given
    if not token or not name:
        raise ValueError(f"embedding must be FILE or TOKEN=FILE, got {given!r}")
    return token, name


def _vectors(path: Path, key: str, tensor: StoredTensor) -> np.ndarray:
    """The vectors float32 [n d] in a tensor. Errors as `read`."""
    if tensor.dtype not in _FLOATS or len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(diagnosis.shortened(f"{path}: expected floats [d] or [n d] in {key}, got {got}"))
    vectors = np.asarray(tensor).astype(np.float32).reshape(-1, tensor.shape[-1])
    if not np.isfinite(vectors).all():
        raise ValueError(diagnosis.shortened(f"{path}: values not finite in {key}"))
    return vectors
