"""Finds the largest batch that fits with few compilations, since each takes minutes."""

from collections.abc import Callable
from typing import Protocol, TypeVar


class Result(Protocol):
    """The fields of a compilation's result that the search needs."""

    @property
    def peak_bytes(self) -> int:
        """Bytes that the program needs on a chip."""

    @property
    def fits(self) -> bool:
        """True if a chip has enough memory."""


R = TypeVar("R", bound=Result)

# Four sizes between a power of two and the next. Sizes between them would be hardly faster.
BATCHES = (1, 2, 3, *(size * 2**octave for octave in range(9) for size in (4, 5, 6, 7)))


def largest_batch(measure: Callable[[int], R], first: int, limit_bytes: int) -> list[R]:
    """Measures batch sizes until the largest of BATCHES that fits is known. Returns all results in their order.

    Memory is almost linear in the batch size. The next size is therefore where the line through the two results
    nearest to the limit meets the limit. It is moved between the largest size that fits and the smallest that does
    not, so that the search always ends.

    Args:
        measure: compiles for a batch size per chip.
        first: the first batch size, rounded down to one of BATCHES.
        limit_bytes: bytes of a chip's memory.
    """
    index = max((i for i, batch in enumerate(BATCHES) if batch <= first), default=0)
    results: dict[int, R] = {}
    while index not in results:
        results[index] = measure(BATCHES[index])
        fitting = max((i for i, result in results.items() if result.fits), default=-1)
        failing = min((i for i, result in results.items() if not result.fits), default=len(BATCHES))
        if failing - fitting <= 1:
            break
        guess = _guess({BATCHES[i]: result.peak_bytes for i, result in results.items()}, limit_bytes)
        index = max((i for i, batch in enumerate(BATCHES) if batch <= guess), default=0)
        if fitting in results and index <= fitting:
            index = fitting + 1  # confirms that the next size does not fit
        index = min(max(index, fitting + 1), failing - 1)
    return list(results.values())


def _guess(peaks: dict[int, int], limit_bytes: int) -> float:
    """Returns the batch size at which memory reaches the limit, on the line through the two results nearest to it."""
    a, *others = sorted(peaks, key=lambda batch: abs(peaks[batch] - limit_bytes))
    if not others:
        return 2 * a if peaks[a] <= limit_bytes else a / 2
    b = others[0]
    slope = (peaks[b] - peaks[a]) / (b - a)
    return a + (limit_bytes - peaks[a]) / slope if slope > 0 else max(a, b) * 2
