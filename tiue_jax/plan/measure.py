"""One compilation for a TPU, and what it tells."""

import dataclasses
import re
import time
from typing import Any, Self

import jax
from jax._src.config import EffortLevel  # no public name for what the option's name stands for

from tiue_jax import flops
from tiue_jax.plan import hlo
from tiue_jax.plan.chips import Chip
from tiue_jax.plan.programs import Program

MODES = ("quick", "full")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a compiled program needs of each chip. Bytes and FLOPs are per chip and step (or batch of images).

    Attributes:
        topology: it was compiled for.
        program: "train" or "sampler".
        mode: "quick", whose memory and FLOPs are right, or "full", whose cycles are as well.
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
        bytes_accessed: of memory; None where it did not compile, and as the other two here.
        collectives: by kind, how many there are and the bytes that a chip sends for them.
        background_bytes: of what is sent, that which the schedule has a chip send while it computes; in full mode.
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


def measure(made: Program, chip: Chip, chips: int, mode: str, **about: Any) -> Measured:
    """Compiles a program.

    Args:
        made: what to compile.
        chip: the kind of chip.
        chips: how many run it.
        mode: one of MODES.
        about: the fields of Measured that say what it is.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refused it for another reason than memory.
    """
    traced, parts = made
    state = sum(parts.values())
    known = {
        "mode": mode,
        "parts": parts,
        "state_bytes": state,
        "flops_per_chip": flops.count(traced.jaxpr) // chips,
        **about,
    }
    began = time.monotonic()
    lowered = traced.lower()
    options = {"optimization_level": EffortLevel.O0.value} if mode == "quick" else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if (needed := memory_needed(str(error))) is None:
            raise
        return Measured(
            **known,
            temp_bytes=needed - state,
            peak_bytes=needed,
            hbm_bytes=chip.hbm_bytes,
            fits=False,
            bytes_accessed=None,
            collectives=None,
            background_bytes=None,
            estimated_cycles=None,
            compile_seconds=time.monotonic() - began,
        )
    memory, text = compiled.memory_analysis(), hlo.read(compiled.as_text())
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Measured(
        **known,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        hbm_bytes=chip.hbm_bytes,
        fits=peak <= chip.hbm_bytes,
        bytes_accessed=int(compiled.cost_analysis()["bytes accessed"]),
        collectives=text.collectives,
        background_bytes=text.background_bytes if mode == "full" else None,
        estimated_cycles=text.estimated_cycles if mode == "full" else None,
        compile_seconds=time.monotonic() - began,
    )


def memory_needed(message: str) -> int | None:
    """Bytes that a program needs, arguments included, from the compiler's error that a chip has not so many.

    None for another error.
    """
    found = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm|HLO temporaries \(([\d.]+)([KMG]?)\)", message)
    if found is None:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return round(float(size) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])
