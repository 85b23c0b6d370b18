"""The prompts of training: the name of a concept or an alias, with or without an article, with or without a style."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def with_article(name: str) -> str:
    """Returns "a red apple" for "red apple"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def names_of(prompt: str, aliases: Sequence[str]) -> list[str]:
    """Returns all texts for a concept: [prompt, "a prompt", alias, "an alias", ...]."""
    return [text for name in (prompt, *aliases) for text in (name, with_article(name))]


def styled(text: str, phrase: str) -> str:
    """Returns "a red apple, 3d render" for "a red apple" and "3d render"."""
    return f"{text}, {phrase}"


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """Returns the first of `choices` (the name) half of the time, and otherwise any of them."""
    return choices[0 if rng.random() < 0.5 else int(rng.integers(len(choices)))]


def rows_of(texts: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """Returns all prompts of a concept: its `texts`, then the same in the first style, and so on."""
    return [*texts, *(styled(text, phrase) for phrase in phrases for text in texts)]


def row_in_style(text: int, style: int, count: int) -> int:
    """Returns the row in `rows_of` of text number `text` of `count` in style number `style`."""
    return (style + 1) * count + text


def pick_row(count: int, style: int, rng: np.random.Generator, with_style: float = 0.5) -> int:
    """Returns a row of `rows_of` for a concept of `count` texts, with this style in the share `with_style` of draws."""
    text = pick(range(count), rng)
    return text if rng.random() >= with_style else row_in_style(text, style, count)
