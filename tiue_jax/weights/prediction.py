"""Reads in a checkpoint what its UNet predicts and with which noise schedule it was trained."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiue_jax.files import read_text
from tiue_jax.weights.tensor_files import StoredTensor, read_metadata
from tiue_jax.weights.tree import is_float

_ZERO = 1e-5  # Stable Diffusion's last alphas_cumprod is 0.0047; rescaled to no signal it is 0, or 5e-8 in some tools
_CONFIGS = (".yaml", ".yml")  # of a file beside the checkpoint, in the layout of the original repositories
_PARAMETERIZATIONS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction"}
_PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?([\w-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
_ZERO_SNR = re.compile(
    r"^\s*(?:ztsnr|zero_snr|zero_terminal_snr|rescale_betas_zero_snr)\s*:\s*(?:true|True|yes)\b", re.MULTILINE
)
_METADATA = "modelspec.prediction_type"  # of the SAI model specification


class Evidence(NamedTuple):
    """The evidence that a file holds about its UNet.

    Attributes:
        prediction_type: "epsilon" or "v_prediction".
        source: the tensor, the metadata field or the file that says it.
    """

    prediction_type: str
    source: str


def read_evidence(path: Path, tensors: Mapping[str, StoredTensor]) -> Evidence | None:
    """Reads the evidence in the tensors, the metadata or a .yaml file beside a checkpoint. None if there is none.

    Raises:
        ValueError: they contradict each other, name another parameterization, or say that the noise schedule was
            rescaled to zero terminal SNR, which is not supported.
    """
    found = []
    if "v_pred" in tensors:
        found.append(Evidence("v_prediction", "its tensor v_pred"))
    if written := read_metadata(path).get(_METADATA):
        found.append(_evidence(path, written, f"its metadata field {_METADATA}"))
    for suffix in _CONFIGS:
        config = path.with_suffix(suffix)
        if not config.is_file():
            continue
        text = read_text(config)
        if match := _PARAMETERIZATION.search(text):
            found.append(_evidence(path, match[1], str(config)))
        if match := _ZERO_SNR.search(text):
            raise _zero_snr(path, f"{config} says {' '.join(match[0].split())}")
    if "ztsnr" in tensors:
        raise _zero_snr(path, "it holds the tensor ztsnr")
    table = tensors.get("alphas_cumprod")
    if table is not None and is_float(table.dtype) and len(table.shape) == 1 and table.shape[0]:
        last = float(np.asarray(table)[-1])
        if abs(last) < _ZERO:
            raise _zero_snr(path, f"its alphas_cumprod ends at {last:g}")
    if len({evidence.prediction_type for evidence in found}) > 1:
        both = " but ".join(f"{evidence.source} says {evidence.prediction_type}" for evidence in found)
        raise ValueError(f"{path}: {both}: pass --prediction_type after you have removed one of them")
    return found[0] if found else None


def _evidence(path: Path, written: str, source: str) -> Evidence:
    """Reads a parameterization. ValueError if it is another than noise or v."""
    prediction_type = _PARAMETERIZATIONS.get(written.strip().lower().removesuffix("_prediction"))
    if prediction_type is None:
        raise ValueError(f"{path}: {source} says {written[:50]!r}, expected one of {sorted(_PARAMETERIZATIONS)}")
    return Evidence(prediction_type, source)


def _zero_snr(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: {why}: trained with zero terminal SNR (rescale_betas_zero_snr), which is not supported")
