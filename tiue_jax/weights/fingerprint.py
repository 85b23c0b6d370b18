"""Fingerprints of models: short texts that tell whether two folders hold the same model, without reading it whole.

They do not depend on where a folder lies, on the names of its weight files, or on how many there are. A fingerprint of
weights is made of the name, the dtype and the shape of every tensor, and of a few of its bytes. So other weights of the
same shapes have another fingerprint, but not weights in which single numbers were changed. Checksums find those.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiue_jax.models.vae import JSON_NOTES
from tiue_jax.weights import layout, tokenizer_files
from tiue_jax.weights.model_folder import read_config_dict
from tiue_jax.weights.tensor_files import StoredTensor, open_folder

LENGTH = 16  # hexadecimal digits of a fingerprint
SAMPLES, SAMPLED_BYTES = 4, 64  # read at so many places of each tensor, from its first to its last byte


def of_model(folder: Path) -> str:
    """The fingerprint of a model folder: its configuration and its weights.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    _, tensors = open_folder(folder)
    digest = _hash(_settings(read_config_dict(folder)))
    handles: dict[Path, int] = {}
    try:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            if tensor.path not in handles:
                handles[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            for sample in _samples(handles[tensor.path], tensor):
                digest.update(sample)
    finally:
        for handle in handles.values():
            os.close(handle)
    return digest.hexdigest()[:LENGTH]


def of_pipeline(folder: Path) -> dict[str, str]:
    """The fingerprint of each part of a pipeline folder, by the part's name. Errors as `of_model`."""
    tokenizer = {name: content.hex() for name, content in tokenizer_files.read(folder / "tokenizer").items()}
    scheduler = read_config_dict(folder / "scheduler", layout.SCHEDULER_CONFIG)
    return {
        **{part: of_model(folder / part) for part in layout.MODEL_PARTS},
        "tokenizer": _hash(tokenizer).hexdigest()[:LENGTH],
        "scheduler": _hash(_settings(scheduler)).hexdigest()[:LENGTH],
    }


def _samples(handle: int, tensor: StoredTensor) -> Iterator[bytes]:
    """Bytes of a tensor from SAMPLES places; all of a small tensor."""
    if tensor.size <= SAMPLES * SAMPLED_BYTES:
        yield os.pread(handle, tensor.size, tensor.offset)
        return
    for i in range(SAMPLES):
        start = (tensor.size - SAMPLED_BYTES) * i // (SAMPLES - 1)
        yield os.pread(handle, SAMPLED_BYTES, tensor.offset + start)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that are notes, such as the version of the program that wrote it."""
    return {name: value for name, value in config.items() if name not in JSON_NOTES}


def _hash(value: dict[str, Any]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode())
