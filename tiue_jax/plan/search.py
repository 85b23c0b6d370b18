"""The largest batch that fits, found with few compilations, each of which takes minutes."""

from collections.abc import Callable
from typing import Protocol, TypeVar


class Result(Protocol):
    """What is asked of a compilation."""

    @property
    def peak_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...


R = TypeVar("R", bound=Result)

# Four sizes an octave: what lies between is hardly faster, and not worth minutes of compilation.
BATCHES = (1, 2, 3, *(size * 2**octave for octave in range(9) for size in (4, 5, 6, 7)))


def largest_batch(measure: Callable[[int], R], first: int, limit_bytes: int) -> list[R]:
    """Measures batch sizes until the largest of BATCHES that fits is known; returns all results, in order.

    Memory is close to a straight line in the batch, so each guess is where the line through the last two results meets
    the limit; where that misses it is a bisection.

    Args:
        measure: compiles for a batch per chip.
        first: the first to try, rounded down to one of BATCHES.
        limit_bytes: memory of a chip.
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
            index = fitting + 1  # the line says that this is the largest: see that the next does not fit
        index = min(max(index, fitting + 1), failing - 1)
    return list(results.values())


def _guess(peaks: dict[int, int], limit_bytes: int) -> float:
    """The batch at which memory reaches the limit, on the line through the two results nearest to it."""
    nearest = sorted(peaks, key=lambda batch: abs(peaks[batch] - limit_bytes))[:2]
    if len(nearest) == 1:
        (batch,) = nearest
        return 2 * batch if peaks[batch] <= limit_bytes else batch / 2
    a, b = nearest
    slope = (peaks[b] - peaks[a]) / (b - a)
    return a + (limit_bytes - peaks[a]) / slope if slope > 0 else max(a, b) * 2
