"""Measures one program: compiles it for TPUs or GPUs and reads memory, FLOPs and communication from the result."""

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
    """The needs of a compiled program. Bytes and FLOPs are per chip and step, or per batch of images for a sampler.

    Attributes:
        topology: the topology that it was compiled for, such as "v5e:4x4" or "h100:8".
        program: "train" or "sampler".
        mode: "quick" or "full", see compiler.compile_program.
        batch_per_chip: rows of the batch.
        data, fsdp: the shape of the mesh.
        remat: the remat policy; None for a sampler.
        parts: bytes that stay in memory between steps, by part.
        state_bytes: the sum of `parts`.
        temp_bytes: bytes of temporaries.
        peak_bytes: bytes of arguments, temporaries and outputs, see compiler.Compiled.
        hbm_bytes: bytes of a chip's memory.
        fits: True if the program fits in the memory.
        flops_per_chip: floating-point operations, see flops.count.
        bytes_accessed: bytes read from and written to memory, see hlo.bytes_accessed. None if the program does not fit.
        collectives: number of collectives by kind, and the bytes that a chip sends for them. None if the program does
            not fit.
        background_bytes: bytes that a chip sends while it computes. None if the program does not fit.
        estimated_cycles: the compiler's estimate, only in full mode.
        compile_seconds: seconds that the compilation took.
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
        """Returns the inverse of dataclasses.asdict, also after JSON. TypeError if fields are missing or unknown."""
        read = cls(**values)
        if read.collectives is None:
            return read
        pairs = {kind: (count, size) for kind, (count, size) in read.collectives.items()}
        return dataclasses.replace(read, collectives=pairs)

    @property
    def collective_bytes(self) -> int:
        """The bytes that a chip sends in a step."""
        return sum(size for _, size in (self.collectives or {}).values())


def measure(build: Callable[[], Program], chip: Chip, chips: int, mode: str, **about: Any) -> Measured:
    """Compiles a program and measures it.

    Args:
        build: makes the program, see compiler.compile_program.
        chip: the kind of chip.
        chips: the number of chips that run the program.
        mode: one of compiler.MODES.
        about: the other fields of `Measured` that describe the program: topology, program, batch_per_chip, data, fsdp
            and remat.

    Raises:
        jax.errors.JaxRuntimeError, RuntimeError, OSError, ModuleNotFoundError: as compiler.compile_program.
        ValueError: as compiler.compile_program and hlo.read.
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
