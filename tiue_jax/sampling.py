"""How a model is sampled: the settings in `tiue_config.json`, their defaults, and what overrides them."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from tiue_jax.files import read_json
from tiue_jax.schedule import SPACINGS, Schedule

STEPS = {"tiue": 4, "ddim": 25, "one_step": 1}  # the samplers, and the number of steps where nobody says
GUIDANCE_SCALE = 7.5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler and its settings. None stands for the sampler's own default, or the scheduler's spacing."""

    sampler: str = "ddim"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    timestep_spacing: str | None = None

    def __post_init__(self):
        k, w = self.num_inference_steps, self.guidance_scale
        if self.sampler not in STEPS:
            raise ValueError(f"sampler must be among {list(STEPS)}, got {self.sampler!r}")
        if k is not None and (not isinstance(k, int) or k < 1):
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {k!r}")
        if w is not None and not isinstance(w, int | float):
            raise ValueError(f"guidance_scale must be a number, got {w!r}")
        if self.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing must be among {list(SPACINGS)}, got {self.timestep_spacing!r}")
        if w is not None and self.sampler != "ddim":
            raise ValueError(f"guidance_scale is a setting of sampler 'ddim', got {w} with {self.sampler!r}")
        if self.sampler == "one_step" and (k not in (None, 1) or self.timestep_spacing is not None):
            given = {"num_inference_steps": k, "timestep_spacing": self.timestep_spacing}
            raise ValueError(f"sampler 'one_step' takes one step and no spacing, got {given}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Raises ValueError naming a field that is unknown, or its value."""
        for name in sorted(set(config) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"unknown sampling field {name!r} = {config[name]!r}")
        return cls(**config)

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

    def resolve(self, schedule: Schedule) -> "Sampling":
        """These settings with nothing left to default. ValueError where the schedule has not so many timesteps."""
        steps = self.num_inference_steps or STEPS[self.sampler]
        if self.sampler == "one_step":
            return Sampling("one_step", 1)
        self.respaced(schedule).timesteps(steps)
        guidance = GUIDANCE_SCALE if self.sampler == "ddim" and self.guidance_scale is None else self.guidance_scale
        return Sampling(self.sampler, steps, guidance, self.timestep_spacing or schedule.timestep_spacing)

    def respaced(self, schedule: Schedule) -> Schedule:
        """The schedule with the spacing of these settings."""
        return dataclasses.replace(schedule, timestep_spacing=self.timestep_spacing or schedule.timestep_spacing)
