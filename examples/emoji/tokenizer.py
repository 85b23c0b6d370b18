"""Trains the small byte-pair vocabulary of the emoji model: {out}/tokenizer, in the format of CLIP's tokenizer.

    python examples/emoji/tokenizer.py --out runs/emoji

The layout is OpenAI's: 256 byte symbols, the same 256 at the end of a word, one token per merge, then the two special
tokens. Every text can be encoded. The padding token is the end of text, as in SD 1.5.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from dataset import Dataset
from styles import STYLES
from texts import rows_of
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 2000
CONTEXT = 24  # tokens, start and end included
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIPTokenizer splits a text
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def train_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Returns the `count` most useful byte-pair merges for `texts`, in order of use."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:count]


def save(folder: Path, merges: list[tuple[str, str]]) -> None:
    """Writes vocab.json, merges.txt and the two configuration files that transformers' CLIPTokenizer reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [s + END_OF_WORD for s in alphabet] + ["".join(m) for m in merges] + [START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    folder.mkdir(parents=True, exist_ok=True)
    merge_lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", {s: i for i, s in enumerate(symbols)}),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args()

    phrases = [style.phrase for style in STYLES]
    texts = [text for row in Dataset.load(args.out).texts for text in rows_of(row, phrases)]
    save(args.out / "tokenizer", train_merges(texts, VOCABULARY - 514))

    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    cut = sum(n > CONTEXT for n in lengths)
    print(f"{len(tokenizer)} tokens; {len(texts)} texts of {np.mean(lengths):.1f} tokens on average, {cut} cut")


if __name__ == "__main__":
    main()
