"""Prompts in, pictures out, from the compiled sampler in this folder: no model code, only the files beside this one.

    python sampler.py --prompt "a red apple" --seed 0 --out apple.png

or, in Python with this folder on the path, `Sampler()(["a red apple"], seed=0)`. Needs jax, numpy, safetensors and
tokenizers; PNG files need Pillow. `compiled.json` says what the sampler was made for. It gives the pictures that the
pipeline it was exported from gives: an image depends on the seed, its prompt and its number among that prompt's
images, not on the batch. It runs on the first device.

What XLA makes of it for this machine is kept in `$XDG_CACHE_HOME/tiue_jax/xla` (~/.cache/tiue_jax/xla), or where
JAX_COMPILATION_CACHE_DIR says, for the next run of the command; `--no_compile_cache` keeps nothing.
"""

import argparse
import json
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MANIFEST, WEIGHTS, TOKENIZER = "compiled.json", "weights.safetensors", "tokenizer.json"
PROGRAM = "sampler.{}.jax_export"  # of each platform
FORMAT = 2
BATCH_SIZE = 8  # where the program takes any


class Sampler:
    """The compiled sampler in a folder, that of this file by default.

    Raises:
        FileNotFoundError, ValueError: the folder lacks a file, is of another format or for other platforms.
    """

    def __init__(self, folder: str | Path | None = None):
        folder = Path(__file__).parent if folder is None else Path(folder)
        self.manifest: dict[str, Any] = json.loads(_existing(folder / MANIFEST).read_text(encoding="utf-8"))
        if (found := self.manifest["format"]) != FORMAT:
            raise ValueError(f"{folder / MANIFEST}: format must be {FORMAT}, got {found}")
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.manifest["platforms"]:
            raise ValueError(f"{folder}: compiled for {', '.join(self.manifest['platforms'])}, got {platform}")
        self._tokenizer = Tokenizer.from_file(str(_existing(folder / TOKENIZER)))
        self._weights = jax.device_put(load_file(_existing(folder / WEIGHTS)))
        program = export.deserialize(bytearray(_existing(folder / PROGRAM.format(platform)).read_bytes()))
        self._sample = jax.jit(program.call)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        latents: np.ndarray | None = None,
    ) -> np.ndarray:
        """All images of all prompts, uint8 [n h w 3], the images of one prompt together.

        Args:
            prompts: at least one; "" is the unconditional image. One given twice counts its images on.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            guidance_scale: what `compiled.json` says by default; for samplers that take one.
            latents: float32 [n h w c], standard normal noise for each image in place of the seed's.

        Raises:
            ValueError: naming the argument, its value and what was expected.
            FloatingPointError: naming an image that came out as NaN or infinite.
        """
        made = self.manifest
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {seed}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        if guidance_scale is not None and not made["guided"]:
            raise ValueError(f"guidance_scale is not for this sampler, compiled without guidance, got {guidance_scale}")
        total = len(prompts) * num_images_per_prompt
        shape = (total, *made["latents"])
        if latents is not None and (latents.shape != shape or latents.dtype != np.float32):
            raise ValueError(f"latents must be float32 {list(shape)}, got {latents.dtype} {list(latents.shape)}")

        seen: Counter[str] = Counter()
        ids, prompt_ids, numbers = [], [], []
        for prompt in prompts:
            tokens = self._tokenize(prompt)
            for _ in range(num_images_per_prompt):
                ids.append(tokens)
                prompt_ids.append(zlib.crc32(prompt.encode()))
                numbers.append(seen[prompt])
                seen[prompt] += 1
        scale = made["guidance_scale"] if guidance_scale is None else guidance_scale
        noise = np.zeros(shape, np.float32) if latents is None else latents
        rows = (np.stack(ids), np.array(prompt_ids, np.uint32), np.array(numbers, np.uint32), noise)
        batch = made["batch_size"] or min(BATCH_SIZE, 1 << (total - 1).bit_length())  # few sizes are ever compiled
        null_ids = self._tokenize("")[None]
        pictures = []
        for start in range(0, total, batch):
            parts = [part[start : start + batch] for part in rows]
            padding = batch - len(parts[0])
            ids_, prompt_ids_, numbers_, noise_ = (np.concatenate([x, np.repeat(x[-1:], padding, 0)]) for x in parts)
            given = np.bool_(latents is not None)
            seeded = np.uint32(seed), np.float32(scale)
            made_now = self._sample(self._weights, ids_, null_ids, prompt_ids_, numbers_, *seeded, noise_, given)
            some, finite = (np.asarray(array)[: len(parts[0])] for array in made_now)
            if not finite.all():
                raise FloatingPointError(f"image {start + int(np.argmin(finite))} is not finite")
            pictures.append(some)
        return np.concatenate(pictures)

    def _tokenize(self, prompt: str) -> np.ndarray:
        """Token ids int32 [l], padded; logs a warning where it cuts."""
        length = self.manifest["context"]
        ids = self._tokenizer.encode(prompt).ids
        if len(ids) > length:  # the last token kept is the end of text
            logger.warning("prompt %r is longer than %d tokens, the rest is ignored", prompt, length)
            ids = ids[: length - 1] + ids[-1:]
        return np.array(ids + [self.manifest["pad_token_id"]] * (length - len(ids)), np.int32)


def _existing(path: Path) -> Path:
    """The path of a file; FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a folder of export-compiled")
    return path


def _keep_compiled(keep: bool) -> None:
    """Switches jax's cache of compiled programs on, in the user's folder where jax was not told another, or off."""
    if not keep:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "tiue_jax", "xla"))


def _check_output(out: Path) -> None:
    """Raises ValueError or OSError where no picture can be written there."""
    if out.suffix != ".png":
        raise ValueError(f"out must end in .png, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: no folder {out.parent}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{out}: cannot write: no permission")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr about what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="a .png file; of several NAME-0.png ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images_per_prompt", type=int, default=1)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--no_compile_cache", action="store_true", help="compile anew, and keep nothing")
    args = parser.parse_args(argv[1:])
    try:
        from PIL import Image  # the one thing that only this function needs

        _check_output(args.out)
        _keep_compiled(not args.no_compile_cache)
        how = {name: getattr(args, name) for name in ("seed", "num_images_per_prompt", "guidance_scale")}
        pictures = Sampler()(args.prompt, **how)
        for i, picture in enumerate(pictures):
            out = args.out if len(pictures) == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
            Image.fromarray(picture).save(out)
            print(out)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
