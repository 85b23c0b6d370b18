"""CLIP's tokenizer as one function from prompts to token ids, which several threads may call at once.

Reads the folders that transformers' CLIPTokenizer writes, and gives its ids. It is built on the `tokenizers` library
that is CLIPTokenizer's Rust half: the Python half takes more than a second to import, and sets padding and truncation
at every call, which another thread may be in the middle of using.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tiue_jax.files import read_json

logger = logging.getLogger(__name__)

END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """The CLIPTokenizer in a folder.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt.
        length: of the text encoder's context; the tokenizer's own limit holds where it is lower.

    Raises:
        FileNotFoundError, ValueError: naming the folder, where it holds no such tokenizer.
    """

    def __init__(self, folder: str | Path, length: int):
        folder = Path(folder)
        if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
            raise FileNotFoundError(f"{folder}: no tokenizer.json or vocab.json, expected the files of a CLIPTokenizer")
        try:
            self.backend, self.pad, limit = _read(folder)
        except Exception as error:  # the Rust half raises bare Exceptions on broken files
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: cannot read this tokenizer: {type(error).__name__}: {reason}") from error
        self.length = min(limit, length)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b l], padded; logs a warning for each prompt it cuts."""
        padded = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt, encoding in zip(padded, prompts, self.backend.encode_batch_fast(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > self.length:  # the last token kept is the end of text
                cut = self.backend.decode(ids[self.length - 1 : -1]).replace(END_OF_WORD, " ").strip()
                logger.warning("prompt %r is longer than %d tokens, ignored: %r", prompt, self.length, cut)
                ids = ids[: self.length - 1] + ids[-1:]
            row[: len(ids)] = ids
        return padded


def _read(folder: Path) -> tuple[Backend, int, int]:
    """The Rust half, without truncation and padding; the id of the padding; the most tokens that it is meant for."""
    config, own, added = (
        _optional(folder / f"{name}.json") for name in ("tokenizer_config", "tokenizer", "added_tokens")
    )
    if own:
        vocabulary, merges = own["model"]["vocab"], own["model"]["merges"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    else:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    # as transformers: where the newer field is, it and nothing else says which tokens were added, and how
    names = _SPECIAL | config
    if "added_tokens_decoder" in config:
        more = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        names |= _optional(folder / "special_tokens_map.json")
        more = [{"content": text, "special": False} for text in sorted(added, key=added.__getitem__)]
        more += own.get("added_tokens", [])
    described = {token["content"]: token for token in more}
    special = {key: _added(described.get(_content(names[key]), names[key])) for key in _SPECIAL}
    text = {key: token.content for key, token in special.items()}

    bpe = models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, unk_token=text["unk_token"])
    backend = Backend(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([*(_added(token) for token in more), *special.values()])
    start, end = ((text[key], vocabulary[text[key]]) for key in ("bos_token", "eos_token"))
    backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return backend, backend.token_to_id(text["pad_token"]), config.get("model_max_length", 2**30)


def _added(token: Any) -> AddedToken:
    """An added token of a JSON file: a text, which is a special token then, or fields."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    fields = {name: token[name] for name in _TOKEN_FIELDS if name in token}
    return AddedToken(**{"special": True} | fields)


def _content(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def _optional(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    return read_json(path) if path.is_file() else {}
