"""Samples with the sampler.py of a compiled folder, in a process that cannot import this package, flax or PyTorch.

Arguments: the folder, and the .npy file for the images. Run by test_export_compiled.py.
"""

import importlib
import sys

PROMPTS = ["red apple", "pear", "red apple"]
SEED = 5


class Blocked:
    """An import finder that refuses the packages which the sampler must not need."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("tiue_jax", "flax", "transformers", "torch"):
            raise ImportError(f"{name} is blocked")


def main(folder: str, out: str) -> None:
    sys.meta_path.insert(0, Blocked())
    sys.path.insert(0, folder)
    import numpy as np

    sampler = importlib.import_module("sampler")
    np.save(out, sampler.Sampler()(PROMPTS, seed=SEED))


if __name__ == "__main__":
    main(*sys.argv[1:])
