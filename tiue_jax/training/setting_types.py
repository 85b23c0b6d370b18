"""Types and ranges of settings that several sections of a recipe share."""

from typing import Annotated, Any

from tiue_jax.checked_fields import Range

INT32_MAX = 2**31 - 1  # the counters of steps are int32 on the devices
Count = Annotated[int, Range(1, INT32_MAX)]
AtLeastZero = Annotated[int, Range(0, INT32_MAX)]
Positive = Annotated[float, Range(0, above_low=True)]


def list_as_tuple(value: Any) -> Any:
    """A list, which JSON has for a tuple, as a tuple. Other values as they are."""
    return tuple(value) if isinstance(value, list) else value
