"""The systems that `ablations.py` compares, all on the shipped emoji teacher.

Each training differs from the recipe `ablation_base` in the settings of its row, and in nothing else. Two are
different: `start` begins with another system's student, and `lcm` is a training of its own.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

REFERENCE = "reference"


class System(NamedTuple):
    """One system.

    Attributes:
        group: the table that shows it.
        label: its name in the table.
        kind: what makes its weights. "distil": a training of the recipe. "sampled": nothing, these are the teacher's
            or those of `other`. "average": the mean of the students of `other`, one for each seed. "lcm":
            examples/emoji/train_lcm.py.
        settings: of "distil": changes of the section `distill`. Of the others: flags of the sampling.
        other: the system whose student (of the same seed) a training starts from, or whose students are sampled or
            averaged.
    """

    group: str
    label: str
    kind: Literal["distil", "sampled", "average", "lcm"] = "distil"
    settings: Mapping[str, Any] = {}
    other: str | None = None


_ATTENTION = "('to_q','to_v')"
# "leading" would give one step timestep 1: the one-step student works at the last timestep, as SwiftBrush does.
_ONE_STEP = {"num_inference_steps": 1, "timesteps": "(999,)"}
SYSTEMS = {
    REFERENCE: System("steps", "base recipe, K = 4, one encoder pass"),
    "k-1": System("steps", "K = 1, at timestep 999", settings=_ONE_STEP),
    "k-2": System("steps", "K = 2, at 501 and 1", settings={"num_inference_steps": 2}),
    "k-8": System("steps", "K = 8, from 876 on", settings={"num_inference_steps": 8}),
    "k-1-751": System(
        "steps", "K = 1, at 751, where K = 4 starts", settings={"num_inference_steps": 1, "timesteps": "(751,)"}
    ),
    "k-2-751": System("steps", "K = 2, at 751 and 376", settings={"num_inference_steps": 2, "timesteps": "(751,376)"}),
    "unshared": System("sharing", "the whole UNet at each of 4 steps", settings={"shared_encoder": False}),
    "unshared-2": System(
        "sharing",
        "the whole UNet at each of 2 steps, 501 and 1",
        settings={"shared_encoder": False, "num_inference_steps": 2},
    ),
    "unshared-2-751": System(
        "sharing",
        "the whole UNet at each of 2 steps, 751 and 376",
        settings={"shared_encoder": False, "num_inference_steps": 2, "timesteps": "(751,376)"},
    ),
    "kl-0": System("kl", "no KL term", settings={"kl_weight": 0.0}),
    "kl-1": System("kl", "KL weight 1", settings={"kl_weight": 1.0}),
    "guidance-1-1": System("guidance", "no guidance", settings={"teacher_guidance_scale": 1.0}),
    "guidance-4-1": System("guidance", "teacher 4, LoRA teacher 1", settings={"teacher_guidance_scale": 4.0}),
    "guidance-equal": System("guidance", "2.5 for both", settings={"lora_guidance_scale": 2.5}),
    "guidance-paper": System(
        "guidance", "4.5 for both, the paper's", settings={"teacher_guidance_scale": 4.5, "lora_guidance_scale": 4.5}
    ),
    "guidance-range": System(
        "guidance",
        "teacher drawn from 1.5 to 3.5",
        settings={"teacher_guidance_scale": 1.5, "teacher_guidance_scale_max": 3.5},
    ),
    "weighting": System(
        "weighting", "1 - abar, the paper's", settings={"timestep_weighting": "one_minus_alphas_cumprod"}
    ),
    "trailing": System("timesteps", "trailing", settings={"timestep_spacing": "trailing"}),
    "linspace": System("timesteps", "linspace", settings={"timestep_spacing": "linspace"}),
    "free": System("timesteps", "751, 551, 351, 151", settings={"timesteps": "(751,551,351,151)"}),
    "free-late": System("timesteps", "851, 601, 351, 101", settings={"timesteps": "(851,601,351,101)"}),
    "free-early": System("timesteps", "601, 401, 201, 51", settings={"timesteps": "(601,401,201,51)"}),
    "free-earliest": System("timesteps", "451, 301, 151, 51", settings={"timesteps": "(451,301,151,51)"}),
    "lora-rank-4": System("lora", "rank 4", settings={"lora_rank": 4, "lora_alpha": 6.75}),
    "lora-attention": System("lora", "attention only, the paper's targets", settings={"lora_targets": _ATTENTION}),
    "lora-updates-3": System(
        "updates", "3 updates of the LoRA teacher in a step", settings={"lora_updates_per_step": 3}
    ),
    "start": System("start", "starts from the one-step student", other="k-1"),
    "average": System("average", "mean of the reference's students of all seeds", "average", other=REFERENCE),
    "teacher-25": System("baselines", "teacher, 25 steps, guidance 2.5", "sampled"),
    "teacher-4": System("baselines", "teacher, 4 steps, guidance 2.5", "sampled", {"num_inference_steps": 4}),
    "faster-diffusion": System(
        "baselines",
        "Faster Diffusion, 25 steps, guidance 2.5",
        "sampled",
        {"sampler": "faster_diffusion", "num_inference_steps": 25, "guidance_scale": 2.5},
    ),
    "not-distilled": System(
        "baselines", "teacher's weights as a student", "sampled", {"sampler": "tiue", "num_inference_steps": 4}
    ),
    "lcm": System("baselines", "LCM, 4 steps", "lcm"),
    "lcm-1": System("baselines", "the same LCM, one step", "sampled", {"num_inference_steps": 1}, other="lcm"),
    "swiftbrush": System(
        "baselines",
        "SwiftBrush, one step, equal guidance, no KL term",
        settings={**_ONE_STEP, "kl_weight": 0.0, "lora_guidance_scale": 2.5},
    ),
    "swiftbrush-mean": System(
        "baselines", "mean of SwiftBrush students of all seeds, as in its v2", "average", other="swiftbrush"
    ),
}
# What each table asks, in the order of the page.
GROUPS = {
    "baselines": "Other systems on the same teacher",
    "steps": "Decoder passes, K",
    "sharing": "One encoder pass, or the whole UNet at each step",
    "kl": "The KL term",
    "guidance": "Guidance of the two teachers",
    "weighting": "Weight of the timesteps",
    "timesteps": "Spacing and free timesteps",
    "lora": "LoRA rank and targets",
    "updates": "Updates of the LoRA teacher",
    "start": "Where the student starts",
    "average": "Averaging",
}
