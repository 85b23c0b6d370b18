"""How a model is sampled: the settings in `tiue_config.json`, their defaults, and what overrides them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tiue_jax.files import read_json
from tiue_jax.schedule import SPACINGS, Schedule


class Takes(NamedTuple):
    """What a sampler takes, and what it is where nobody says."""

    num_inference_steps: int
    guidance_scale: float | None = None  # None: it takes none
    timestep_spacing: bool = False
    key_steps: bool = False


SAMPLERS = {
    "tiue": Takes(4, timestep_spacing=True),
    "ddim": Takes(25, guidance_scale=7.5, timestep_spacing=True),
    "one_step": Takes(1),
    "turbo": Takes(1),
    "lcm": Takes(4, guidance_scale=8.5),
    "faster_diffusion": Takes(50, guidance_scale=7.5, timestep_spacing=True, key_steps=True),
}
# Of 50 steps, those at which Faster Diffusion (arXiv 2312.09608) runs the encoder: the paper's non-uniform choice.
KEY_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler and its settings. None stands for the sampler's own default, or the scheduler's spacing.

    `key_steps` are the steps at which "faster_diffusion" runs the encoder, counted from 0; one number n is every n-th.
    """

    sampler: str = "ddim"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    timestep_spacing: str | None = None
    key_steps: int | tuple[int, ...] | None = None

    def __post_init__(self):
        k, w = self.num_inference_steps, self.guidance_scale
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be among {list(SAMPLERS)}, got {self.sampler!r}")
        if k is not None and (not isinstance(k, int) or k < 1):
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {k!r}")
        if w is not None and not (isinstance(w, int | float) and math.isfinite(w)):
            raise ValueError(f"guidance_scale must be a finite number, got {w!r}")
        if self.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing must be among {list(SPACINGS)}, got {self.timestep_spacing!r}")
        if self.key_steps is not None and not _are_key_steps(self.key_steps):
            expected = "a number >= 1 or increasing numbers from 0"
            raise ValueError(f"key_steps must be {expected}, got {self.key_steps!r}")
        for name in ("guidance_scale", "timestep_spacing", "key_steps"):
            value, takers = getattr(self, name), [s for s, takes in SAMPLERS.items() if getattr(takes, name)]
            if value is not None and self.sampler not in takers:
                raise ValueError(f"{name} is a setting of samplers {takers}, got {value!r} with {self.sampler!r}")
        if self.sampler == "one_step" and k not in (None, 1):
            raise ValueError(f"sampler 'one_step' takes one step, got num_inference_steps {k}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Raises ValueError naming a field that is unknown, or its value."""
        for name in sorted(set(config) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"unknown sampling field {name!r} = {config[name]!r}")
        lists = {name: tuple(value) for name, value in config.items() if isinstance(value, list)}  # as JSON has them
        return cls(**config | lists)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads `tiue_config.json`; ValueError naming the file."""
        config = read_json(path)
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not left to default."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def override(self, **given: Any) -> "Sampling":
        """These settings with those given that are not None; another sampler starts from its own defaults."""
        given = {name: value for name, value in given.items() if value is not None}
        base = self if given.get("sampler", self.sampler) == self.sampler else Sampling(given["sampler"])
        return dataclasses.replace(base, **given)

    def resolve(self, schedule: Schedule, embeds_guidance: bool = False) -> "Sampling":
        """These settings with nothing left to default that the sampler takes.

        Args:
            schedule: the model's.
            embeds_guidance: the UNet is told the guidance scale (`time_cond_proj_dim`), as some of LCM are.

        Raises:
            ValueError: the schedule has not so many timesteps, or the sampler is not for such a UNet.
        """
        takes = SAMPLERS[self.sampler]
        if embeds_guidance and self.sampler != "lcm":
            raise ValueError(f"sampler must be 'lcm' for a UNet with time_cond_proj_dim, got {self.sampler!r}")
        steps = self.num_inference_steps or takes.num_inference_steps
        if self.sampler == "lcm":
            schedule.lcm_timesteps(steps)
        elif self.sampler == "turbo":
            schedule.euler_form(steps)
        else:
            self.respaced(schedule).timesteps(steps)
        guidance = takes.guidance_scale
        if self.sampler == "lcm" and not embeds_guidance:
            guidance = 1.0  # such a model, LCM-LoRA among them, has its guidance distilled in
        return dataclasses.replace(
            self,
            num_inference_steps=steps,
            guidance_scale=guidance if self.guidance_scale is None else self.guidance_scale,
            timestep_spacing=self.respaced(schedule).timestep_spacing if takes.timestep_spacing else None,
            key_steps=self._resolved_key_steps(steps) if takes.key_steps else None,
        )

    def respaced(self, schedule: Schedule) -> Schedule:
        """The schedule with the spacing of these settings."""
        return dataclasses.replace(schedule, timestep_spacing=self.timestep_spacing or schedule.timestep_spacing)

    def _resolved_key_steps(self, steps: int) -> tuple[int, ...]:
        if self.key_steps is None:
            return tuple(sorted({step * steps // 50 for step in KEY_STEPS}))
        if isinstance(self.key_steps, int):
            return tuple(range(0, steps, self.key_steps))
        if self.key_steps[-1] >= steps:
            raise ValueError(f"key_steps must be below num_inference_steps {steps}, got {list(self.key_steps)}")
        return self.key_steps


def read_key_steps(given: Sequence[str] | None) -> int | list[int] | None:
    """The numbers of a command line's flag, or the one number. ValueError where they are none."""
    if given is None:
        return None
    try:
        numbers = [int(text) for text in given]
    except ValueError as error:
        raise ValueError(f"key_steps must be whole numbers, got {','.join(given)!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _are_key_steps(value: Any) -> bool:
    if isinstance(value, tuple):
        numbers = all(type(step) is int for step in value)
        return numbers and value[:1] == (0,) and all(a < b for a, b in zip(value, value[1:], strict=False))
    return type(value) is int and value >= 1
