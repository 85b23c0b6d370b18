"""Pushes an exported folder to the Hugging Face hub: licence, sample images, model card, all in one commit."""

import re
from collections.abc import Sequence
from pathlib import Path

from tiue_jax import images
from tiue_jax.convert import card
from tiue_jax.files import writing_aside
from tiue_jax.pipeline import Pipeline
from tiue_jax.weights import hub
from tiue_jax.weights.download import reason_of
from tiue_jax.weights.layout import CARD

IMAGES = "images"  # the folder of the sample images in an export
PROMPTS = ("a red apple",)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LICENCE_LINE = re.compile(r"^license: (.+)$", re.MULTILINE)


class PushError(Exception):
    """An export was not pushed. The message is one line and says so."""


def check_push(name: str, licence: str | None, source_licence: str | None) -> None:
    """Checks what can be known before anything is written.

    Args:
        name: of the repository, owner/name.
        licence: the hub's identifier of the licence of the weights, or None.
        source_licence: the name of the licence of the model that the weights derive from, if it is known.

    Raises:
        ValueError: the name is none of a repository, there is no token, the hub is switched off, or the licence is
            missing or another than that of the model.
    """
    from huggingface_hub import constants, get_token  # here, since it takes half a second

    if not hub.is_repository_name(name):
        raise ValueError(f"--push_to_hub must be a hub repository's name, owner/name, got {name!r}")
    if licence is not None and not _LICENCE_ID.fullmatch(licence):
        raise ValueError(f"--license must be an identifier of the hub, such as apache-2.0, got {licence!r}")
    known = card.HUB_LICENCES.get(source_licence or "")
    if known is None and licence is None:
        raise ValueError(
            "--push_to_hub needs --license, since the licence of the model is not known here: give the hub's "
            "identifier of the licence under which you may publish these weights, such as apache-2.0"
        )
    if known is not None and licence not in (None, known):
        raise ValueError(
            f"--license must be {known}, the licence of the model that the weights derive from, got {licence}"
        )
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub needs the hub, which HF_HUB_OFFLINE switches off: unset it")
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token with write access: run hf auth login, or set HF_TOKEN")


def push(
    folder: str | Path,
    name: str,
    *,
    licence: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    private: bool = False,
) -> str:
    """Adds licence and sample images to an exported folder, and pushes all of its files to the hub in one commit.

    Call `check_push` before the export.

    Args:
        folder: an exported folder, which has a model card.
        name: of the repository, owner/name. It is made if it does not exist.
        licence: the hub's identifier of the licence, for a card that has none.
        prompts: of the sample images.
        private: makes a new repository private.

    Returns:
        The address of the commit.

    Raises:
        PushError: the reason, and how to push the folder later. The folder is whole.
    """
    folder = Path(folder)
    try:
        complete(folder, licence, prompts)
        return upload(folder, name, private=private)
    except Exception as error:  # of the hub, its HTTP library, the operating system, or the sampler
        later = f"hf upload {name} {folder}"
        raise PushError(
            f"{folder} is whole, but was not pushed to {name}; to push it later: {later}; {reason_of(error)}"
        ) from error


def complete(folder: Path, licence: str | None, prompts: Sequence[str]) -> None:
    """Draws sample images into `folder`/images with the folder's sampler, and adds them and the licence to the card.

    Raises:
        OSError, ValueError: as `Pipeline`, or a file cannot be written.
    """
    text = (folder / CARD).read_text(encoding="utf-8")
    drawn = Pipeline.from_pretrained(folder)(list(prompts), seed=0)
    (folder / IMAGES).mkdir(exist_ok=True)
    names = {}
    for number, (prompt, image) in enumerate(zip(prompts, drawn, strict=True)):
        names[prompt] = f"{IMAGES}/{number}.png"
        images.write_png(folder / names[prompt], image, {"prompt": prompt, "seed": 0})
    if licence is not None:
        text = _LICENCE_LINE.sub(f"license: {licence}", text, count=1)
    with writing_aside(folder / CARD) as aside:
        aside.write_text(card.with_images(text, names), encoding="utf-8")


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Pushes all files of a folder in one commit, so that the hub never shows a part of them. Returns its address.

    Raises:
        Exception: of the hub, its HTTP library, or the operating system.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    return api.create_commit(repository, additions, commit_message="Export of TiUE-JAX").commit_url
