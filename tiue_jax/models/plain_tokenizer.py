"""CLIP tokenizers in their usual files, built without transformers, whose import takes more than a second.

`read` builds what `transformers.CLIPTokenizer` would build: tests/test_tokenizer.py compares the JSON of both. A folder
with anything unusual, such as added tokens, is left to transformers.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # in the order in which transformers adds them
# Fields that may have one value only, and fields that say nothing about token ids.
_FIXED = {"tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
_NOTES = ("name_or_path", "special_tokens_map_file")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
END_OF_WORD = "</w>"


class PlainTokenizer(NamedTuple):
    """The attributes of a `transformers.CLIPTokenizer` that models/tokenizer.py reads."""

    backend_tokenizer: Tokenizer
    model_max_length: float
    pad_token_id: int
    added_tokens_encoder: dict[str, int]


def read(folder: Path) -> PlainTokenizer | None:
    """Reads vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json.

    Args:
        folder: of the tokenizer.

    Returns:
        None if the folder has other files of a tokenizer, or fields or values that are not known here.

    Raises:
        OSError, ValueError, Exception: a file cannot be read. `tokenizers` raises plain Exceptions.
    """
    if (folder / "tokenizer.json").exists() or (folder / "added_tokens.json").exists():
        return None
    config, special = (_json(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    given = {name: _token(config.pop(name, None)) for name in _SPECIAL}
    tokens = {name: token for name, token in given.items() if token is not None}
    length = config.pop("model_max_length", None)
    config = {name: value for name, value in config.items() if name not in _NOTES}
    is_known = all(name in _FIXED and value == _FIXED[name] for name, value in config.items())
    if not is_known or type(length) is not int or tokens.keys() != given.keys():
        return None
    if any(name not in _SPECIAL or _token(value) != tokens[name] for name, value in special.items()):
        return None
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    bos, eos, unk, pad = (token.content for token in tokens.values())
    if not {bos, eos, unk, pad} <= vocabulary.keys():
        return None
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    affixes = {"end_of_word_suffix": END_OF_WORD, "continuing_subword_prefix": ""}
    tokenizer = Tokenizer(BPE.from_file(*files, unk_token=unk, fuse_unk=False, **affixes))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(tokens.values()))  # of equal texts the last one counts
    tokenizer.post_processor = processors.RobertaProcessing(
        (eos, vocabulary[eos]), (bos, vocabulary[bos]), trim_offsets=False, add_prefix_space=False
    )
    ids = {text: vocabulary[text] for text in (bos, eos, unk, pad)}
    return PlainTokenizer(tokenizer, length, ids[pad], ids)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _token(value: Any) -> AddedToken | None:
    """A special token from its text, or from the text with flags. None if it is neither."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or value.get("__type", "AddedToken") != "AddedToken":
        return None
    flags = {name: x for name, x in value.items() if name not in ("__type", "content", "special")}
    is_known = all(name in _FLAGS and type(x) is bool for name, x in flags.items())
    content = value.get("content")
    return AddedToken(content, **flags, special=True) if is_known and isinstance(content, str) else None
