"""One compilation for a TPU, and what it tells."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Self

from tiue_jax.plan import hlo
from tiue_jax.plan.chips import Chip
from tiue_jax.plan.compiler import compile_program
from tiue_jax.plan.programs import Program


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a compiled program needs of each chip. Bytes and FLOPs are per chip and step (or batch of images).

    Attributes:
        topology: it was compiled for.
        program: "train" or "sampler".
        mode: "quick" or "full", which alone has cycles.
        batch_per_chip: rows of the batch.
        data, fsdp: the mesh.
        remat: the policy; None for a sampler.
        parts: bytes that stay between steps, by part.
        state_bytes: their sum.
        temp_bytes: what a step needs besides.
        peak_bytes: arguments, temporaries and outputs, less the outputs that take the place of an argument.
        hbm_bytes: memory of the chip.
        fits: the compiler found room.
        flops_per_chip: see flops.count.
        bytes_accessed: of memory, see hlo.bytes_accessed; None where it does not fit, and as the other two here.
        collectives: by kind, how many there are and the bytes that a chip sends for them.
        background_bytes: of what is sent, that which the schedule has a chip send while it computes.
        estimated_cycles: the compiler's, in full mode.
        compile_seconds: how long it took.
    """

    topology: str
    program: str
    mode: str
    batch_per_chip: int
    data: int
    fsdp: int
    remat: Any
    parts: dict[str, int]
    state_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    flops_per_chip: int
    bytes_accessed: int | None
    collectives: dict[str, tuple[int, int]] | None
    background_bytes: int | None
    estimated_cycles: int | None
    compile_seconds: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of dataclasses.asdict, also after JSON. TypeError where fields are missing or unknown."""
        read = cls(**values)
        if read.collectives is None:
            return read
        pairs = {kind: (count, size) for kind, (count, size) in read.collectives.items()}
        return dataclasses.replace(read, collectives=pairs)

    @property
    def collective_bytes(self) -> int:
        """Bytes that a chip sends in a step."""
        return sum(size for _, size in (self.collectives or {}).values())


def measure(build: Callable[[], Program], chip: Chip, chips: int, mode: str, **about: Any) -> Measured:
    """Compiles a program.

    Args:
        build: what to compile, see compiler.compile_program.
        chip: the kind of chip.
        chips: how many run it.
        mode: one of compiler.MODES.
        about: the fields of Measured that say what it is.

    Raises:
        As compiler.compile_program, and ValueError as hlo.read.
    """
    began = time.monotonic()
    compiled = compile_program(build, mode)
    state, peak = sum(compiled.parts.values()), compiled.needed or compiled.peak_bytes
    fits = compiled.needed is None and peak <= chip.hbm_bytes
    known = {
        "mode": mode,
        "parts": compiled.parts,
        "state_bytes": state,
        "peak_bytes": peak,
        "hbm_bytes": chip.hbm_bytes,
        "flops_per_chip": compiled.flops // chips,
        **about,
    }
    if not fits:
        return Measured(
            **known,
            temp_bytes=peak - state,
            fits=False,
            bytes_accessed=None,
            collectives=None,
            background_bytes=None,
            estimated_cycles=None,
            compile_seconds=time.monotonic() - began,
        )
    return Measured(
        **known,
        **hlo.read(compiled.text)._asdict(),
        bytes_accessed=hlo.bytes_accessed(compiled.text),
        temp_bytes=compiled.temp_bytes,
        fits=True,
        compile_seconds=time.monotonic() - began,
    )
