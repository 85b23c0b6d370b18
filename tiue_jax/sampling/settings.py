"""The settings that a model is sampled with: `tiue_config.json`, defaults, and overrides."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from tiue_jax.checked_fields import Range, check_fields, check_others, one_of, read, shown
from tiue_jax.files import read_json
from tiue_jax.sampling.samplers import SAMPLERS, takers
from tiue_jax.schedule import SPACINGS, CustomTimesteps, Schedule, check_descending

_Count = Annotated[int, Range(1, 1_000_000)]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler and its settings, checked. `resolve` fills in defaults. Raises ValueError for a setting that is wrong.

    Attributes:
        sampler: a name in samplers.SAMPLERS.
        num_inference_steps: the number of steps, >= 1; K of the student. None is the sampler's default.
        guidance_scale: the scale of classifier-free guidance; at most 1 is no guidance. A UNet with
            `time_cond_proj_dim` takes it as an input, and then each value has a meaning. None is the sampler's default.
        timestep_spacing: among schedule.SPACINGS. None is the schedule's spacing.
        key_steps: the steps at which "faster_diffusion" runs the encoder, increasing from 0. One number n is every n-th
            step. None is the sampler's default.
        timesteps: the timesteps of the steps, descending, instead of those of `timestep_spacing`. None is those.
    """

    sampler: Annotated[str, one_of(SAMPLERS)] = "ddim"
    num_inference_steps: _Count | None = None
    guidance_scale: float | None = None
    timestep_spacing: Annotated[str, one_of(SPACINGS)] | None = None
    key_steps: _Count | tuple[Annotated[int, Range(0, 1_000_000)], ...] | None = None
    timesteps: CustomTimesteps | None = None

    def __post_init__(self):
        check_fields(self)
        if self.key_steps is not None and not _are_key_steps(self.key_steps):
            expected = "a number >= 1 or increasing numbers from 0"
            raise ValueError(f"key_steps must be {expected}, got {shown(self.key_steps)}")
        if self.timesteps is not None:
            check_descending(self.timesteps)
            if self.timestep_spacing is not None:
                both = f"{list(self.timesteps)} and {self.timestep_spacing!r}"
                raise ValueError(f"timesteps and timestep_spacing exclude each other, got {both}")
            if self.num_inference_steps not in (None, len(self.timesteps)):
                got = f"{self.num_inference_steps} and {list(self.timesteps)}: give other timesteps, or a spacing"
                raise ValueError(f"num_inference_steps must be the number of timesteps, got {got}")
        for name in ("guidance_scale", "timestep_spacing", "key_steps", "timesteps"):
            value = getattr(self, name)
            if value is not None and not SAMPLERS[self.sampler].takes(name):
                raise ValueError(f"{name} is a setting of samplers {takers(name)}, got {value!r} with {self.sampler!r}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields of `tiue_config.json`. Raises ValueError for an unknown field or a wrong value."""
        check_others(cls, config, "", fixed={})
        return read(cls, config)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads `tiue_config.json`. Raises ValueError, naming the file, for an unknown field or a wrong value."""
        config = read_json(path)
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def override(self, **given: Any) -> "Sampling":
        """These settings with the given ones in their place, except those that are None.

        If another sampler is given, the settings start from that sampler's defaults. A given spacing replaces
        timesteps, and given timesteps replace a spacing and a number of steps. Raises ValueError for a wrong value.
        """
        given = {name: value for name, value in given.items() if value is not None}
        base = self if given.get("sampler", self.sampler) == self.sampler else Sampling(given["sampler"])
        if "timesteps" in given:
            base = dataclasses.replace(base, timestep_spacing=None, num_inference_steps=None, timesteps=None)
        elif "timestep_spacing" in given:
            base = dataclasses.replace(base, timesteps=None)
        return dataclasses.replace(base, **given)

    def resolve(self, schedule: Schedule, embeds_guidance: bool = False) -> "Sampling":
        """These settings with a value for every setting that the sampler takes, and None for the others.

        Args:
            schedule: the model's noise schedule.
            embeds_guidance: the UNet takes the guidance scale as an input (`time_cond_proj_dim`), as some latent
                consistency models do.

        Raises:
            ValueError: the sampler cannot take this number of steps or these key steps, or is not for such a UNet.
        """
        sampler = SAMPLERS[self.sampler]
        if embeds_guidance and sampler.embedded_guidance_scale is None:
            expected = " or ".join(repr(n) for n, s in SAMPLERS.items() if s.embedded_guidance_scale is not None)
            raise ValueError(f"sampler must be {expected} for a UNet with time_cond_proj_dim, got {self.sampler!r}")
        steps = self.num_inference_steps or len(self.timesteps or ()) or sampler.num_inference_steps
        respaced = self.respaced(schedule)
        sampler.timesteps(respaced, steps)  # raises
        guidance_scale = self.guidance_scale
        if guidance_scale is None:
            guidance_scale = sampler.embedded_guidance_scale if embeds_guidance else sampler.guidance_scale
        takes_spacing = sampler.takes("timestep_spacing") and self.timesteps is None
        spacing = respaced.timestep_spacing if takes_spacing else None
        return dataclasses.replace(
            self,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            timestep_spacing=spacing,
            key_steps=self._resolved_key_steps(steps),
        )

    def check_negative_prompt(self, embeds_guidance: bool = False) -> None:
        """Checks that a negative prompt has an effect on images of these resolved settings.

        Args:
            embeds_guidance: as for `resolve`.

        Raises:
            ValueError: there is no classifier-free guidance, so that a negative prompt would have no effect.
        """
        if embeds_guidance:
            got = "a UNet that takes the guidance scale as an input"
        elif self.guidance_scale is None:
            got = f"sampler {self.sampler!r}, which has no guidance"
        elif self.guidance_scale <= 1:
            got = f"guidance_scale {self.guidance_scale:g}, which is no guidance"
        else:
            return
        needs = f"a guidance_scale above 1 with one of the samplers {', '.join(takers('guidance_scale'))}"
        raise ValueError(f"negative_prompt has no effect without {needs}, got {got}: leave it out")

    def respaced(self, schedule: Schedule) -> Schedule:
        """The schedule with the timesteps or the timestep spacing of these settings."""
        spacing = self.timestep_spacing or schedule.timestep_spacing
        return dataclasses.replace(schedule, timestep_spacing=spacing, custom_timesteps=self.timesteps)

    def _resolved_key_steps(self, steps: int) -> tuple[int, ...] | None:
        sampler = SAMPLERS[self.sampler]
        if sampler.key_steps is None:
            return None
        if self.key_steps is None:  # the default key steps, scaled to this number of steps
            return tuple(sorted({step * steps // sampler.num_inference_steps for step in sampler.key_steps}))
        if isinstance(self.key_steps, int):
            return tuple(range(0, steps, self.key_steps))
        if self.key_steps[-1] >= steps:
            raise ValueError(f"key_steps must be below num_inference_steps {steps}, got {list(self.key_steps)}")
        return self.key_steps


def read_timesteps(given: Sequence[str] | None) -> tuple[int, ...] | None:
    """The timesteps in a command line's list. ValueError if they are no numbers."""
    if given is None:
        return None
    try:
        return tuple(int(text) for text in given)
    except ValueError as error:
        raise ValueError(f"timesteps must be whole numbers, got {','.join(given)!r}") from error


def read_key_steps(given: Sequence[str] | None) -> int | list[int] | None:
    """The key steps in a command line's list: one number, or a list of several. ValueError if they are no numbers."""
    if given is None:
        return None
    try:
        numbers = [int(text) for text in given]
    except ValueError as error:
        raise ValueError(f"key_steps must be whole numbers, got {','.join(given)!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _are_key_steps(steps: int | tuple[int, ...]) -> bool:
    """True for a number, or a tuple of increasing numbers from 0."""
    if isinstance(steps, int):
        return True
    return steps[:1] == (0,) and all(a < b for a, b in zip(steps, steps[1:], strict=False))
