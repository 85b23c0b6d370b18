"""The styles of a model: the last words of its prompts, after a comma, that many prompts share."""

from collections import Counter
from collections.abc import Iterable, Sequence

_SHARE = 0.02  # of the prompts that end with a style, at least


def find(prompts: Iterable[str]) -> list[str]:
    """The styles in the prompts that a model was trained on, the most frequent first.

    "a cat, 3d render" has the style "3d render". A model whose prompts name no style has none.
    """
    total = 0
    endings: Counter[str] = Counter()
    for prompt in prompts:
        total += 1
        subject, comma, ending = prompt.rpartition(",")
        if comma and subject.strip() and ending.strip():
            endings[ending.strip()] += 1
    return [ending for ending, count in endings.most_common() if count > 1 and count >= _SHARE * total]


def join(prompt: str, style: str) -> str:
    """The prompt with the style after a comma. No style leaves the prompt as it is."""
    return f"{prompt}, {style}" if style else prompt


def split(prompt: str, styles: Sequence[str]) -> tuple[str, str]:
    """Undoes `join`: the prompt without its style, and the style, which is "" if it ends with none of `styles`."""
    for style in styles:
        if prompt.endswith(f", {style}"):
            return prompt.removesuffix(f", {style}"), style
    return prompt, ""
