"""CLIP's tokenizer as one function from prompts to token ids, which several threads may call at once."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class Tokenizer:
    """The CLIPTokenizer in a folder.

    It uses the tokenizer's Rust half by itself: transformers' Python half sets padding and truncation at every call,
    which another thread may be in the middle of using, and is slower.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt.
        length: of the text encoder's context; the tokenizer's own limit holds where it is lower.

    Raises:
        FileNotFoundError, ValueError: naming the folder, where transformers cannot read it.
    """

    def __init__(self, folder: str | Path, length: int):
        tokenizer = _load(Path(folder))
        self.length = min(tokenizer.model_max_length, length)
        self.pad = tokenizer.pad_token_id
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # which tokenizer.json may set
        self.backend.no_padding()

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b l], padded; logs a warning for each prompt it cuts."""
        padded = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt, encoding in zip(padded, prompts, self.backend.encode_batch_fast(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > self.length:  # the last token kept is the end of text
                cut = self.backend.decode(ids[self.length - 1 : -1]).strip()
                logger.warning("prompt %r is longer than %d tokens, ignored: %r", prompt, self.length, cut)
                ids = ids[: self.length - 1] + ids[-1:]
            row[: len(ids)] = ids
        return padded


def _load(folder: Path) -> Any:
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"{folder}: no tokenizer.json or vocab.json, expected the files of a CLIPTokenizer")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not installed
    from transformers import CLIPTokenizer  # seconds to import

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # its parsers, in Rust and Python, raise bare Exceptions on broken files
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers cannot read this tokenizer: {reason}") from error
