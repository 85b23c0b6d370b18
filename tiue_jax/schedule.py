"""The noise schedule, the sampling timesteps, and the closed form of the unrolled DDIM sampler.

Notation of docs/method.md: abar is `alphas_cumprod`, and t_K > ... > t_1 are the sampling timesteps. Numbers that
depend only on the schedule are computed once, on the host, in float64.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax.checked_fields import Items, Range, check, check_fields, check_others, one_of, read

SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction")

# Latent consistency models (arXiv 2310.04378): the number of steps of the solver that they are distilled with, and the
# constants of their boundary condition. All published models have the same.
LCM_STEPS = 50
LCM_TIMESTEP_SCALING = 10.0
LCM_SIGMA_DATA = 0.5

# Fields of scheduler_config.json that change the mathematics, with the one value that is supported. Other unknown
# fields belong to solvers that are not used here.
_FIXED: dict[str, Any] = {
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "thresholding": False,
    "original_inference_steps": LCM_STEPS,
    "timestep_scaling": LCM_TIMESTEP_SCALING,
}


_Beta = Annotated[float, Range(0, 1, above_low=True, below_high=True)]


CustomTimesteps = Annotated[tuple[Annotated[int, Range(0, 999_999)], ...], Items(1, 1000)]


def check_descending(timesteps: tuple[int, ...]) -> None:
    """Raises ValueError unless each of some timesteps is smaller than the one before."""
    if any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise ValueError(f"timesteps must descend, such as 999, 749, 499, 249, got {list(timesteps)}")


class ClosedForm(NamedTuple):
    """A sampler that is linear in the noise and in the network's outputs (docs/method.md, section 2).

    The steps are x <- c[i] x + d[i] outputs[i]. Unrolled, they are z_0 = scale noise + sum_i weights[i] outputs[i].

    Attributes:
        timesteps: int32 [k], descending.
        scale: S, the product of all c.
        weights: E, float64 [k]. weights[i] is d[i] times the product of the c of later steps.
        c: float64 [k].
        d: float64 [k].
    """

    timesteps: np.ndarray
    scale: float
    weights: np.ndarray
    c: np.ndarray
    d: np.ndarray


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The fields of diffusers' scheduler_config.json that DDIM (eta = 0) needs, and free timesteps.

    The defaults are those of Stable Diffusion. Raises ValueError for a field with a value that is not supported.

    Attributes:
        custom_timesteps: the sampling timesteps, descending, in the place of those of `timestep_spacing`; None for
            these. A setting of the sampler, which no scheduler_config.json has.
    """

    num_train_timesteps: Annotated[int, Range(1, 1_000_000)] = 1000
    beta_start: _Beta = 0.00085
    beta_end: _Beta = 0.012
    beta_schedule: Annotated[str, one_of(("scaled_linear", "linear"))] = "scaled_linear"
    prediction_type: Annotated[str, one_of(PREDICTION_TYPES)] = "epsilon"
    timestep_spacing: Annotated[str, one_of(SPACINGS)] = "leading"
    steps_offset: Annotated[int, Range(0, 1_000_000)] = 1
    set_alpha_to_one: bool = False
    custom_timesteps: CustomTimesteps | None = None

    def __post_init__(self):
        check_fields(self)
        if (given := self.custom_timesteps) is not None:
            check_descending(given)
            if given[0] >= self.num_train_timesteps:
                limit = self.num_train_timesteps - 1
                raise ValueError(f"timesteps must be at most the schedule's last, {limit}, got {list(given)}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the noise schedule from the scheduler config of any diffusers solver (DDIM, PNDM, Euler, ...).

        Raises:
            ValueError: a field has a value that is not supported.
        """
        kind = check("_class_name", str | None, config.get("_class_name"))
        if kind in ("DDIMScheduler", "DDPMScheduler"):
            config = {"clip_sample": True, **config}  # the default of these classes in diffusers
        check_others(cls, config, "", _FIXED, ignored=[name for name in config if name not in _FIXED])
        # the defaults of diffusers' classes for fields that a file leaves out
        missing: dict[str, Any] = {
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "steps_offset": 0,
            "set_alpha_to_one": kind == "DDIMScheduler",
        }
        fields = missing | dict(config)
        fields.pop("custom_timesteps", None)  # no field of diffusers
        return read(cls, fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a scheduler_config.json for diffusers' DDIMScheduler."""
        fields = dataclasses.asdict(self)
        del fields["custom_timesteps"]
        return {"_class_name": "DDIMScheduler", "clip_sample": False, "trained_betas": None, **fields}

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar: the cumulative product of 1 - beta, float64 [num_train_timesteps]."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps) ** (1 / power)
        return np.cumprod(1 - betas)

    def timesteps(self, num_inference_steps: int) -> np.ndarray:
        """The sampling timesteps: `custom_timesteps`, or as diffusers' DDIMScheduler spaces them: int32 [k].

        Raises:
            ValueError: num_inference_steps is not in 1 ... num_train_timesteps, or not the number of
                `custom_timesteps`, or a timestep is past the last one.
        """
        k, total = num_inference_steps, self.num_train_timesteps
        if (given := self.custom_timesteps) is not None:
            if k != len(given):
                expected = f"{len(given)}, the number of the timesteps {list(given)}"
                raise ValueError(f"num_inference_steps (K) must be {expected}, got {k}: give other timesteps")
            return np.array(given, np.int32)
        if not 1 <= k <= total:
            raise ValueError(f"num_inference_steps (K) must be between 1 and {total}, got {k}")
        steps: np.ndarray
        if self.timestep_spacing == "leading":
            steps = (np.arange(k) * (total // k))[::-1] + self.steps_offset
        elif self.timestep_spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / k))[:k] - 1
        else:
            steps = np.round(np.linspace(0, total - 1, k))[::-1]
        if steps[0] >= total:
            raise ValueError(
                f"num_inference_steps (K) = {k} with steps_offset {self.steps_offset} reaches timestep "
                f"{int(steps[0])}, expected at most {total - 1}"
            )
        return steps.astype(np.int32)

    def closed_form(self, num_inference_steps: int) -> ClosedForm:
        """DDIM (eta = 0) at `num_inference_steps` timesteps, as single steps and unrolled.

        Each step goes from a timestep t to its successor s = t - num_train_timesteps // num_inference_steps; of
        `custom_timesteps`, to the next one. The last successor may be negative: abar_s is then 1 or abar_0, as
        `set_alpha_to_one` says. So it is after the last of `custom_timesteps`.

        DDIM is equation 12 of arXiv 2010.02502. The coefficients are derived in docs/method.md, section 2.

        Raises:
            ValueError: as `timesteps`.
        """
        timesteps = self.timesteps(num_inference_steps)
        abar = self.alphas_cumprod
        if self.custom_timesteps is None:
            successors = timesteps - self.num_train_timesteps // num_inference_steps
        else:
            successors = np.append(timesteps[1:], -1)
        final = 1.0 if self.set_alpha_to_one else abar[0]
        return self._closed_form(timesteps, np.where(successors >= 0, abar[np.maximum(successors, 0)], final))

    def euler_timesteps(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of SD-Turbo: "trailing", whatever `timestep_spacing` is. int32 [k], descending.

        Raises:
            ValueError: as `timesteps`.
        """
        trailing = dataclasses.replace(self, timestep_spacing="trailing", custom_timesteps=None)
        return trailing.timesteps(num_inference_steps)

    def euler_form(self, num_inference_steps: int) -> ClosedForm:
        """Euler steps in sigma = sqrt(1 - abar) / sqrt(abar) at `euler_timesteps`, the last one to sigma 0.

        diffusers' EulerDiscreteScheduler, as SD-Turbo configures it. Its latents are z / sqrt(abar). In the latents z,
        an Euler step is the DDIM step from one timestep to the next (arXiv 2010.02502, section 4.3).

        Raises:
            ValueError: as `timesteps`.
        """
        timesteps = self.euler_timesteps(num_inference_steps)
        return self._closed_form(timesteps, np.append(self.alphas_cumprod[timesteps[1:]], 1.0))

    def lcm_timesteps(self, num_inference_steps: int) -> np.ndarray:
        """The timesteps of a latent consistency model, as in diffusers' LCMScheduler, int32 [k], descending.

        Raises:
            ValueError: num_inference_steps is not in 1 ... LCM_STEPS, or the schedule has fewer timesteps.
        """
        if self.num_train_timesteps < LCM_STEPS:
            fewest = f"at least {LCM_STEPS} for sampler 'lcm'"
            raise ValueError(f"num_train_timesteps must be {fewest}, got {self.num_train_timesteps}")
        if not 1 <= num_inference_steps <= LCM_STEPS:
            limits = f"between 1 and {LCM_STEPS} for sampler 'lcm'"
            raise ValueError(f"num_inference_steps must be {limits}, got {num_inference_steps}")
        solver = np.arange(LCM_STEPS, 0, -1) * (self.num_train_timesteps // LCM_STEPS) - 1
        picked = np.floor(np.linspace(0, LCM_STEPS, num_inference_steps, endpoint=False))
        return solver[picked.astype(int)].astype(np.int32)

    @staticmethod
    def lcm_boundary(timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """c_skip and c_out of the consistency function c_skip z + c_out z_0(z, t): timesteps [k] -> float64 [k] each.

        The boundary condition of arXiv 2310.04378, with the time scaling of the published models.
        """
        scaled = LCM_TIMESTEP_SCALING * timesteps
        total = scaled**2 + LCM_SIGMA_DATA**2
        return LCM_SIGMA_DATA**2 / total, scaled / np.sqrt(total)

    def _closed_form(self, timesteps: np.ndarray, abar_s: np.ndarray) -> ClosedForm:
        """The DDIM steps from timesteps [k], each to the timestep s with abar_s [k].

        A DDIM step predicts z_0 and the noise from the latents x and the network's output o, and mixes them again with
        the noise level of s. For a network that predicts noise:

            x_s = sqrt(abar_s) (x - sqrt(1 - abar_t) o) / sqrt(abar_t) + sqrt(1 - abar_s) o

        This is x_s = c x + d o. For v-prediction, z_0 = sqrt(abar_t) x - sqrt(1 - abar_t) o and
        noise = sqrt(abar_t) o + sqrt(1 - abar_t) x.
        """
        abar_t = self.alphas_cumprod[timesteps]
        if self.prediction_type == "epsilon":
            c = np.sqrt(abar_s / abar_t)
            d = np.sqrt(1 - abar_s) - np.sqrt(abar_s * (1 - abar_t) / abar_t)
        else:
            c = np.sqrt(abar_s * abar_t) + np.sqrt((1 - abar_s) * (1 - abar_t))
            d = np.sqrt((1 - abar_s) * abar_t) - np.sqrt(abar_s * (1 - abar_t))
        products = np.append(np.cumprod(c[::-1])[::-1], 1.0)  # products[i] = c[i] c[i+1] ... c[k-1]
        return ClosedForm(timesteps, scale=float(products[0]), weights=d * products[1:], c=c, d=d)

    def signal_and_noise(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(abar_t) and sqrt(1 - abar_t): integers t [b] -> float32 [b 1 1 1] each."""
        abar = self.alphas_cumprod

        def look_up(table: np.ndarray) -> jax.Array:
            return jnp.asarray(table, jnp.float32)[t][:, None, None, None]

        return look_up(np.sqrt(abar)), look_up(np.sqrt(1 - abar))

    def add_noise(self, latents: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise: latents z_0 and noise [b h w c], t [b] -> [b h w c]."""
        signal, sigma = self.signal_and_noise(t)
        return signal * latents + sigma * noise

    def to_epsilon(self, output: jax.Array, latents: jax.Array, t: jax.Array) -> jax.Array:
        """The noise that the network's output at (latents, t) predicts: [b h w c], t [b] -> [b h w c]."""
        if self.prediction_type == "epsilon":
            return output
        signal, sigma = self.signal_and_noise(t)
        return signal * output + sigma * latents

    def to_original(self, output: jax.Array, latents: jax.Array, t: jax.Array) -> jax.Array:
        """The z_0 that the network's output at (latents, t) predicts: [b h w c], t [b] -> [b h w c]."""
        signal, sigma = self.signal_and_noise(t)
        if self.prediction_type == "epsilon":
            return (latents - sigma * output) / signal
        return signal * latents - sigma * output
