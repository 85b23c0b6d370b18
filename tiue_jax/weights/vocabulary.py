"""Adds textual inversion embeddings to the vocabulary of a pipeline, without a change to its folder.

The result is a folder of links in the user's cache. Only the files that differ are new: those of the tokenizer, and the
text encoder's table of token embeddings. So every command reads the pipeline as it reads any other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tiue_jax.files import user_cache, write_json
from tiue_jax.models import tokenizer
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.temporary import temporary_folder
from tiue_jax.weights import diagnosis, embedding_files, hub, layout, model_folder, tokenizer_files
from tiue_jax.weights.embedding_files import Embedding
from tiue_jax.weights.pipeline_folder import check_pipeline, read_config
from tiue_jax.weights.tensor_files import TRANSFORMERS_WEIGHTS, StoredTensor, open_folder

_TABLE = "embeddings.token_embedding.weight"  # the end of the table's name
_TABLE_FILE = "token_embedding.safetensors"
_LINKED = ("unet", "vae", "scheduler", layout.MODEL_INDEX, layout.TIUE_CONFIG)
# How diffusers adds a token: it is matched anywhere in a text, after the text was normalised.
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def resolve(name: str | Path, embeddings: Sequence[str | Path] = (), dtype: str = "float32") -> Path:
    """Finds the folder of a pipeline, after a download if necessary, with embeddings added to its vocabulary.

    Args:
        name: a name for hub.resolve.
        embeddings: names for embedding_files.read.
        dtype: as for hub.resolve.

    Raises:
        FileNotFoundError, ValueError: as hub.resolve, check_pipeline and `extend`.
    """
    folder = hub.resolve(name, dtype)
    check_pipeline(folder)
    return extend(folder, embeddings)


def extend(folder: Path, embeddings: Sequence[str | Path]) -> Path:
    """A pipeline folder whose text encoder and tokenizer know the tokens of these embeddings too.

    Tokens and ids are those of diffusers' `load_textual_inversion`. Vectors are kept in float32.

    Args:
        folder: a pipeline folder. It is not changed.
        embeddings: names for embedding_files.read. Without any, the result is `folder`.

    Raises:
        FileNotFoundError: an embedding or a file of the pipeline is missing.
        ValueError: an embedding has another width than the text encoder, or its token is in the vocabulary already.
        OSError: the user's cache cannot be written.
    """
    if not embeddings:
        return folder
    found = [embedding_files.read(given) for given in embeddings]
    config = read_config(folder / "text_encoder", CLIPTextConfig)
    for embedding in found:
        _check_width(embedding, config.hidden_size, folder)
    _, tensors = open_folder(folder / "text_encoder")
    table_name = next((name for name in tensors if name.endswith(_TABLE)), None)
    if table_name is None:
        raise ValueError(f"{folder / 'text_encoder'}: no tensor that ends in {_TABLE}, expected a CLIPTextModel")
    table = np.asarray(tensors[table_name]).astype(np.float32)
    cache = user_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with temporary_folder(cache, "vocabulary") as aside:
        files, ids = _tokenizer_with(folder / "tokenizer", found, aside / "tokenizer")
        table = _table_with(table, found, ids, folder)
        config_dict = model_folder.read_config_dict(folder / "text_encoder") | {"vocab_size": len(table)}
        digest = _digest(folder, files, table, config_dict, tensors)
        whole = cache / f"{folder.absolute().name}-with-{len(ids)}-tokens-{digest}"
        if whole.is_dir():
            return whole
        new = aside / "new"
        _write(new, folder, files, table_name, table, config_dict, tensors)
        try:
            new.rename(whole)
        except OSError:
            if not whole.is_dir():  # otherwise another process has made it
                raise
    return whole


def _check_width(embedding: Embedding, width: int, folder: Path) -> None:
    got = embedding.vectors.shape[1]
    if got != width:
        of_file, of_model = (f" ({base})" if (base := diagnosis.base_of_width(x)) else "" for x in (got, width))
        raise ValueError(
            f"{embedding.path}: an embedding of width {got}{of_file}, expected the width of the text encoder in "
            f"{folder}, {width}{of_model}"
        )


def _tokenizer_with(folder: Path, embeddings: Sequence[Embedding], aside: Path) -> tuple[dict[str, bytes], list[int]]:
    """The files of a tokenizer with the tokens of embeddings, and the ids of these tokens in order.

    Args:
        folder: of the tokenizer.
        embeddings: whose tokens are added.
        aside: a new folder, to which the files are written so that the tokenizer can be read.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: a token is in the vocabulary, or the files cannot hold it.
    """
    files = tokenizer_files.read(folder)
    tokens = tokenizer.load(folder)
    several = tokenizer.tokens_of_several_vectors(tokens.added_tokens_encoder)
    ids = []
    for embedding in embeddings:
        added = {known.lower() for known in tokens.added_tokens_encoder}  # they match in any case
        words = {*tokens.get_vocab(), *added}
        taken = [token for token in embedding.tokens if words & {token, token.lower(), f"{token.lower()}</w>"}]
        tokens.add_tokens([token for token in embedding.tokens if token not in taken])
        own = tokens.convert_tokens_to_ids(embedding.tokens)
        if len(own) > 1:
            several[own[0]] = own
        if taken or tokenizer.tokens_of_several_vectors(tokens.added_tokens_encoder) != several:
            clash = repr(taken[0]) if taken else f"{embedding.token!r} or one that differs by _1"
            raise ValueError(
                f"{embedding.path}: the token {clash} is in the vocabulary of {folder} or of another embedding: "
                "give another one as TOKEN=FILE"
            )
        ids += own
    names = [token for embedding in embeddings for token in embedding.tokens]
    files |= _files_with(files, dict(zip(names, ids, strict=True)))
    aside.mkdir()
    for name, content in files.items():
        (aside / name).write_bytes(content)
    if tokenizer.load(aside).added_tokens_encoder != tokens.added_tokens_encoder:
        raise ValueError(f"{folder}: transformers does not read the tokens {', '.join(names)} as they were added")
    return files, ids


def _files_with(files: Mapping[str, bytes], ids: Mapping[str, int]) -> dict[str, bytes]:
    """The files of a tokenizer that list added tokens, with more tokens."""
    added = json.loads(files.get("added_tokens.json", b"{}")) | dict(ids)
    changed = {"added_tokens.json": added}
    if "tokenizer.json" in files:
        whole = json.loads(files["tokenizer.json"])
        more = [{"id": number, "content": token, **_ADDED} for token, number in ids.items()]
        changed["tokenizer.json"] = whole | {"added_tokens": [*whole.get("added_tokens", []), *more]}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in config:  # transformers then reads no other list
        decoder = {str(number): {"content": token, **_ADDED} for token, number in ids.items()}
        changed["tokenizer_config.json"] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | decoder}
    return {name: json.dumps(content, indent=2, ensure_ascii=False).encode() for name, content in changed.items()}


def _table_with(table: np.ndarray, embeddings: Sequence[Embedding], ids: Sequence[int], folder: Path) -> np.ndarray:
    """The text encoder's table float32 [v d], with the vectors of embeddings at their ids."""
    if min(ids) > len(table):
        raise ValueError(f"{folder}: the tokenizer has {min(ids)} tokens, the text encoder only {len(table)}")
    larger = np.zeros((max(len(table), max(ids) + 1), table.shape[1]), np.float32)
    larger[: len(table)] = table
    larger[list(ids)] = np.concatenate([embedding.vectors for embedding in embeddings])
    return larger


def _digest(
    folder: Path,
    files: Mapping[str, bytes],
    table: np.ndarray,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
) -> str:
    """A hash of all that the new folder holds and links to, so that no folder ever changes."""
    total = hashlib.blake2b(digest_size=6)
    placed = {name: (str(tensor.path.absolute()), tensor.offset) for name, tensor in tensors.items()}
    total.update(json.dumps([str(folder.absolute()), placed, config], sort_keys=True).encode())
    for name in sorted(files):
        total.update(json.dumps([name, len(files[name])]).encode() + files[name])
    total.update(table.tobytes())
    return total.hexdigest()


def _write(
    new: Path,
    folder: Path,
    files: Mapping[str, bytes],
    table_name: str,
    table: np.ndarray,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Writes the folder `new`: the tokenizer, the text encoder in shards, and links to all else."""
    (new / "tokenizer").mkdir(parents=True)
    for name, content in files.items():
        (new / "tokenizer" / name).write_bytes(content)
    encoder = new / "text_encoder"
    encoder.mkdir()
    write_json(encoder / "config.json", dict(config))
    save_file({table_name: table}, encoder / _TABLE_FILE, metadata={"format": "pt"})
    sources = sorted({tensor.path.absolute() for tensor in tensors.values()})
    shards = {path: f"{number:05d}-{path.name}" for number, path in enumerate(sources)}
    for path, name in shards.items():
        (encoder / name).symlink_to(path)
    weight_map = {name: shards[tensor.path.absolute()] for name, tensor in tensors.items()} | {table_name: _TABLE_FILE}
    write_json(encoder / f"{TRANSFORMERS_WEIGHTS}.index.json", {"metadata": {}, "weight_map": weight_map})
    for name in _LINKED:
        if (folder / name).exists():
            (new / name).symlink_to((folder / name).absolute())
