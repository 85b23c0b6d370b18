"""Two nodes: load a student's folder, and sample it in one pass.

A student is a folder that `tiue convert export` writes, in ComfyUI's models/diffusers. The `pipeline.py` in it samples
it, with PyTorch and diffusers and without TiUE-JAX. SPDX-License-Identifier: Apache-2.0
"""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

MODEL_INDEX, PIPELINE = "model_index.json", "pipeline.py"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_SEED = 2**64 - 1
_NO_STUDENT = "(no student in models/diffusers)"


def folders() -> dict[str, Path]:
    """The students in ComfyUI's folders of diffusers models, by their path in the folder, with / between the names."""
    import folder_paths  # of ComfyUI

    found = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for folder, _, files in os.walk(root, followlinks=True):
            if {MODEL_INDEX, PIPELINE} <= set(files):
                found.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
    return dict(sorted(found.items()))


class LoadStudent:
    """Loads a student's folder."""

    CATEGORY = "TiUE"
    DESCRIPTION = "Loads a loop-free student, a folder that `tiue convert export` wrote, from models/diffusers."
    RETURN_TYPES = ("TIUE_STUDENT",)
    RETURN_NAMES = ("student",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        trust = "the student's pipeline.py is a program that runs on this machine: read it, then switch this on"
        return {
            "required": {
                "folder": (list(folders()) or [_NO_STUDENT], {"tooltip": "a folder in models/diffusers"}),
                "dtype": (list(DTYPES), {"default": "float32", "tooltip": "of the networks"}),
                "trust_code": ("BOOLEAN", {"default": False, "tooltip": trust}),
            }
        }

    def load(self, folder: str, dtype: str, trust_code: bool) -> tuple[Any]:
        """Returns the pipeline of the student, on ComfyUI's device.

        Raises:
            ValueError: there is no such student, or its code is not trusted.
        """
        path = folders().get(folder)
        if path is None:
            raise ValueError(f"no student {folder!r} in models/diffusers: write one with tiue convert export")
        if not trust_code:
            raise ValueError(f"{path / PIPELINE} is a program: read it, then switch trust_code on")
        loaded = DiffusionPipeline.from_pretrained(
            path, custom_pipeline=str(path), torch_dtype=DTYPES[dtype], trust_remote_code=True, local_files_only=True
        )
        return (loaded.to(_device()),)


class Sample:
    """Samples a student in one pass."""

    CATEGORY = "TiUE"
    DESCRIPTION = "Draws images of a prompt in one pass: no loop, no guidance, no negative prompt."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        passes = "decoder passes, all at once; 0 is the number that the student was trained with"
        size = {"default": 0, "min": 0, "max": 4096, "step": 8, "tooltip": "in pixels; 0 is the student's size"}
        seed = {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}
        return {
            "required": {
                "student": ("TIUE_STUDENT",),
                "prompt": ("STRING", {"default": "a red apple", "multiline": True, "dynamicPrompts": True}),
                "seed": ("INT", seed),
                "k": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": passes}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "number of images"}),
                "width": ("INT", size),
                "height": ("INT", size),
            }
        }

    def sample(
        self, student: Any, prompt: str, seed: int, k: int, batch_size: int, width: int, height: int
    ) -> tuple[torch.Tensor]:
        """Returns the images, float32 [b h w 3] in [0, 1] on the CPU, as ComfyUI expects them."""
        images = student(
            prompt,
            num_images_per_prompt=batch_size,
            num_inference_steps=k or None,
            width=width or None,
            height=height or None,
            generator=torch.Generator("cpu").manual_seed(seed),  # the same noise on every device
            output_type="pt",
            return_dict=False,
        )[0]
        return (images.permute(0, 2, 3, 1).float().cpu().contiguous(),)


def _device() -> torch.device:
    """The device that ComfyUI computes on."""
    from comfy import model_management

    return model_management.get_torch_device()


NODE_CLASS_MAPPINGS = {"TiUELoadStudent": LoadStudent, "TiUESample": Sample}
NODE_DISPLAY_NAME_MAPPINGS = {"TiUELoadStudent": "Load TiUE student", "TiUESample": "Sample TiUE student (one pass)"}
