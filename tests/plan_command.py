"""The command `tiue plan` on a small model, in this process."""

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiue_jax.cli import plan

CONFIG = Path(__file__).parents[1] / "configs" / "sd21_tiue.py"


def on(model: Path, settings: Mapping[str, Any]) -> Callable[..., tuple[int, str, str]]:
    """A function from flags to the exit status, stdout and stderr. `settings` are beside those of a small model."""
    small = {
        "model.pretrained_model_name_or_path": model,
        "train.batch_size": 8,
        "distill.lora_rank": 4,
        "distill.num_inference_steps": 2,
        **settings,
    }
    changed = [f"--config.{name}={value}" for name, value in small.items()]

    def run(*flags: str) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = plan.main(["tiue plan", f"--config={CONFIG}", *changed, *flags])
        return status, out.getvalue(), err.getvalue()

    return run
