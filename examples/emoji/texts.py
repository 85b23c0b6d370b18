"""The prompts of training: the name of a concept or an alias, with or without an article, with or without a style."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def with_article(name: str) -> str:
    """Returns "a red apple" for "red apple"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def names_of(prompt: str, aliases: Sequence[str]) -> list[str]:
    """Returns all texts for a concept: [prompt, "a prompt", alias, "an alias", ...]."""
    return [text for name in (prompt, *aliases) for text in (name, with_article(name))]


def styled(text: str, phrase: str) -> str:
    """Returns "a red apple, 3d render" for "a red apple" and "3d render"."""
    return f"{text}, {phrase}"


def pick(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    """Returns the first of `choices` (the name) half of the time, and otherwise any of them."""
    return choices[0 if rng.random() < 0.5 else rng.integers(len(choices))]


def pick_row(count: int, style: int, rng: np.random.Generator) -> int:
    """Returns the row of a prompt in `rows_of`: half of the time without style, half of the time with number `style`."""
    name = pick(range(count), rng)
    return int(name) if rng.random() < 0.5 else (style + 1) * count + int(name)


def rows_of(texts: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """Returns all prompts of a concept: its `texts`, then the same in the first style, and so on."""
    return [*texts, *(styled(text, phrase) for phrase in phrases for text in texts)]
