"""What each emoji may be called in training: its name first, then its aliases, each also with an article."""

from pathlib import Path

import numpy as np


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def load_texts(run: Path) -> list[list[str]]:
    """Per concept of {run}/data.npz: [name, "a name", alias, "an alias", ...]."""
    data = np.load(run / "data.npz")
    rows = zip(data["prompts"].tolist(), data["aliases"].tolist(), strict=True)
    names = [[prompt, *filter(None, aliases.split("|"))] for prompt, aliases in rows]
    return [[text for name in row for text in (name, with_article(name))] for row in names]


def pick(choices, rng: np.random.Generator):
    """The first of `choices` (the name) half of the time, else any of them."""
    return choices[0 if rng.random() < 0.5 else rng.integers(len(choices))]
