"""The vocabulary of CLIP, which the models of Stable Diffusion 1.x and 2.x share, as the files of a CLIPTokenizer.

The package has the merges only, compressed. The 49,408 tokens follow from them: a token for each of 256 bytes, the same
at the end of a word, one for each merge, and two special tokens. This is OpenAI's vocabulary, as open_clip_torch ships
it (see NOTICE).
"""

import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tiue_jax.files import user_cache
from tiue_jax.temporary import temporary_folder
from tiue_jax.weights.hub import ASSETS

MERGES = ASSETS / "clip-tokenizer" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
# The token after the end of a prompt, by the model's key in PRESETS, as in diffusers' folders. SD 2.x was trained with
# OpenCLIP, which fills with id 0, and that is the token "!".
PAD_TOKENS = {"sd15": END, "sd21-base": "!", "sd21": "!"}
CONTEXT_LENGTH = 77  # tokens of a prompt, with the first and the last one
_END_OF_WORD = "</w>"


def tokenizer_folder(kind: str) -> Path:
    """A folder with the tokenizer of a published model, in the user's cache. It is written at the first call.

    Args:
        kind: a key of PAD_TOKENS.

    Raises:
        OSError: the cache cannot be written.
    """
    files = tokenizer_files(PAD_TOKENS[kind])
    # the name contains a hash of the content: another version of this package makes another folder
    digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()[:12]
    cache = user_cache()
    folder = cache / f"clip-tokenizer-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cache, "clip-tokenizer") as aside:
            new = aside / "new"
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process has made it
                    raise
    return folder


def tokenizer_files(pad_token: str) -> dict[str, bytes]:
    """The files of the tokenizer by name, as transformers reads them.

    Args:
        pad_token: the token that fills a prompt up to the length of the context, see PAD_TOKENS.
    """
    merges = gzip.decompress(MERGES.read_bytes())
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": _json(_vocabulary(merges.decode())),
        "merges.txt": merges,
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(config | special),
    }


def _vocabulary(merges: str) -> dict[str, int]:
    """The ids of all tokens, from merges.txt, which has a line of comment and then a merge a line."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols)]
    tokens += [line.replace(" ", "") for line in merges.split("\n")[1:-1]]
    return {token: i for i, token in enumerate((*tokens, START, END))}


def _byte_symbols() -> list[str]:
    """The symbols that stand for bytes, in the order of their ids.

    A byte that prints in Latin-1 stands for itself. These come first. The others are the characters from 256 on.
    """
    printed = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    return [chr(code) for code in (*printed, *range(256, 512 - len(printed)))]


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
