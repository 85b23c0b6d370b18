"""Lists in error messages, cut to a length at which a terminal still shows the beginning of the message."""

from collections.abc import Sequence

LENGTH = 400  # characters of a list; with the sentence around it, an error has at most 600


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """Joins the first items, as many as fit in LENGTH characters, and says how many more there are.

    The first item is always in the text. It is cut if it is longer than LENGTH.
    """
    text = items[0] if len(items[0]) <= LENGTH else f"{items[0][: LENGTH - 4]} ..."
    count = 1
    while count < len(items) and len(text) + len(separator) + len(items[count]) <= LENGTH:
        text += separator + items[count]
        count += 1
    more = len(items) - count
    return f"{text}{separator}and {more} more" if more else text
