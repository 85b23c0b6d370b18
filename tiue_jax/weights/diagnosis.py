"""Errors about many tensors, in one line of at most 600 characters."""

from collections.abc import Collection, Mapping

LONGEST = 600  # characters of an error
EXAMPLES = 5  # of each kind of problem, fewer if the error is too long


def misfit(start: str, problems: Mapping[str, Collection[str]]) -> str:
    """The text of an error that counts each kind of problem and gives a few examples, at most LONGEST characters.

    Args:
        start: the file and the sentence that begins the error.
        problems: by kind, such as "missing", the tensors that have it. Kinds without tensors are left out.
    """
    for examples in range(EXAMPLES, 0, -1):
        kinds = [f"{len(names)} {kind}: {_some(names, examples)}" for kind, names in problems.items() if names]
        text = f"{start}: {'; '.join(kinds)}"
        if len(text) <= LONGEST:
            return text
    return f"{text[: LONGEST - 4]} ..."


def _some(names: Collection[str], count: int) -> str:
    """The first names, and the number of the others."""
    first, more = list(names)[:count], len(names) - count
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
