"""Samples images of prompts with the compiled sampler in this folder. It needs no model code.

    python sampler.py --prompt "a red apple" --seed 0 --out apple.png

In Python, with this folder on the path: `Sampler()(["a red apple"], seed=0)`. It needs jax, numpy, safetensors and
tokenizers, and Pillow for PNG files. `compiled.json` holds the settings of the export. The images are those of the
exported pipeline: an image depends on the seed, on its prompt, and on its number among the images of that prompt. It
does not depend on the batch. The sampler runs on the first device.

The command keeps the compiled program for the next run in JAX_COMPILATION_CACHE_DIR, or in
`$XDG_CACHE_HOME/tiue_jax/xla` (~/.cache/tiue_jax/xla). `--no_compile_cache` keeps nothing.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MANIFEST, WEIGHTS, TOKENIZER = "compiled.json", "weights.safetensors", "tokenizer.json"
PROGRAM = "sampler.{}.jax_export"  # one for each platform
FORMAT = 2
BATCH_SIZE = 8  # the largest batch of a program that takes any batch


class Sampler:
    """The compiled sampler in a folder. The default is the folder of this file.

    Attributes:
        manifest: the content of `compiled.json`.

    Raises:
        FileNotFoundError, ValueError: the folder lacks a file, has another format or is for other platforms.
    """

    def __init__(self, folder: str | Path | None = None):
        folder = Path(__file__).parent if folder is None else Path(folder)
        self.manifest = _read_manifest(folder / MANIFEST)
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.manifest["platforms"]:
            raise ValueError(f"{folder}: compiled for {', '.join(self.manifest['platforms'])}, got {platform}")
        with _reading(folder / TOKENIZER) as path:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.encode("a photo")  # some damage shows only then
        with _reading(folder / WEIGHTS) as path:
            weights = load_file(path)
        with _reading(folder / PROGRAM.format(platform)) as path:
            program = export.deserialize(bytearray(path.read_bytes()))
            (expected, ids, _, _, _, _, _, latents, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        _check_same(folder / WEIGHTS, _kinds(expected), _kinds(weights))
        of_program = {"context": ids.shape[1], "latents": list(latents.shape[1:])}
        _check_same(folder / MANIFEST, of_program, {name: self.manifest[name] for name in of_program})
        self._check_tokens(folder / TOKENIZER, weights)
        self._weights = jax.device_put(weights)
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
        """Samples images, uint8 [n h w 3]. The images of one prompt follow each other.

        Args:
            prompts: at least one; "" is the unconditional image. A prompt that comes twice gets different images.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            guidance_scale: for samplers with guidance. The default is in `compiled.json`.
            latents: float32 [n h w c], the initial standard normal noise of each image, instead of the seed's.

        Raises:
            ValueError: names the argument, its value and what was expected.
            FloatingPointError: names an image with NaN or infinite values.
        """
        manifest = self.manifest
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if not _is_whole(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {seed}")
        if not _is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be an integer >= 1, got {num_images_per_prompt}")
        if guidance_scale is not None and not manifest["guided"]:
            raise ValueError(f"guidance_scale is not for this sampler, compiled without guidance, got {guidance_scale}")
        if guidance_scale is not None and not _is_finite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
        total = len(prompts) * num_images_per_prompt
        needed = total * manifest["height"] * manifest["width"] * 3
        if needed > (available := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            gigabytes = f"{needed / 1e9:.0f} GB, this machine has {available / 1e9:.0f} GB"
            raise ValueError(f"num_images_per_prompt = {num_images_per_prompt}: {total} images need {gigabytes}")
        shape = (total, *manifest["latents"])
        if latents is not None and (latents.shape != shape or latents.dtype != np.float32):
            raise ValueError(f"latents must be float32 {list(shape)}, got {latents.dtype} {list(latents.shape)}")

        seen: Counter[str] = Counter()
        tokens, prompt_hashes, image_numbers = [], [], []
        for prompt in prompts:
            ids = self.tokenize(prompt)
            for _ in range(num_images_per_prompt):
                tokens.append(ids)
                prompt_hashes.append(zlib.crc32(prompt.encode()))
                image_numbers.append(seen[prompt])
                seen[prompt] += 1
        all_ids, null_ids = np.stack(tokens), self.tokenize("")[None]
        prompt_ids, numbers = np.array(prompt_hashes, np.uint32), np.array(image_numbers, np.uint32)
        noise = np.zeros(shape, np.float32) if latents is None else latents
        scale = manifest["guidance_scale"] if guidance_scale is None else guidance_scale
        # powers of two, so that few sizes are ever compiled
        batch = manifest["batch_size"] or min(BATCH_SIZE, 1 << (total - 1).bit_length())
        images = []
        for start in range(0, total, batch):
            batch_images, batch_finite = self._sample(
                self._weights,
                _rows(all_ids, start, batch),
                null_ids,
                _rows(prompt_ids, start, batch),
                _rows(numbers, start, batch),
                np.uint32(seed),
                np.float32(scale),
                _rows(noise, start, batch),
                np.bool_(latents is not None),
            )
            count = min(batch, total - start)
            finite = np.asarray(batch_finite)[:count]
            if not finite.all():
                raise FloatingPointError(f"image {start + int(np.argmin(finite))} is not finite")
            images.append(np.asarray(batch_images)[:count])
        return np.concatenate(images)

    def tokenize(self, prompt: str) -> np.ndarray:
        """Token ids int32 [l], padded to the context. Logs a warning for a prompt that is too long, and cuts it."""
        length = self.manifest["context"]
        ids = self._tokenizer.encode(prompt).ids
        if len(ids) > length:  # the last token kept is the end of text
            logger.warning("prompt %r is longer than %d tokens, the rest is ignored", prompt, length)
            ids = ids[: length - 1] + ids[-1:]
        return np.array(ids + [self.manifest["pad_token_id"]] * (length - len(ids)), np.int32)

    def _check_tokens(self, path: Path, weights: dict[str, np.ndarray]) -> None:
        """Raises ValueError if the tokenizer has tokens that the text encoder does not know."""
        size = next(x.shape[0] for name, x in weights.items() if "token_embedding" in name)
        largest = max([self.manifest["pad_token_id"], *self._tokenizer.get_vocab().values()])
        if largest >= size:
            raise ValueError(f"{path}: the text encoder knows {size} tokens: expected ids below it, got {largest}")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads compiled.json. ValueError, naming the file and the field, if it is damaged."""
    with _reading(path):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(manifest).__name__}")
    if (found := manifest.get("format")) != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {_shown(found)}")
    get = manifest.get
    platforms, latents, pad = get("platforms"), get("latents"), get("pad_token_id")
    checks = {
        "platforms": ("a list of texts", isinstance(platforms, list) and all(isinstance(p, str) for p in platforms)),
        "guided": ("true or false", type(get("guided")) is bool),
        "guidance_scale": ("a finite number", _is_finite(get("guidance_scale"))),
        "batch_size": ("null or an integer >= 1", "batch_size" in manifest and _is_size(get("batch_size") or 1)),
        "height": ("an integer >= 1", _is_size(get("height"))),
        "width": ("an integer >= 1", _is_size(get("width"))),
        "latents": ("three integers >= 1", isinstance(latents, list) and [*map(_is_size, latents)] == [True] * 3),
        "context": ("an integer >= 1", _is_size(get("context"))),
        "pad_token_id": ("an integer >= 0", _is_whole(pad) and int(pad or 0) >= 0),
    }
    for name, (expected, holds) in checks.items():
        if not holds:
            raise ValueError(f"{path}: {name} must be {expected}, got {_shown(get(name))}")
    return manifest


def _check_same(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises ValueError for the first entry that is missing, additional or another."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, got = _shown(expected.get(name)), _shown(found.get(name))
            raise ValueError(f"{path}: {name} must be {wanted}, as in the program, got {got}")


def _kinds(arrays: dict[str, Any]) -> dict[str, str]:
    """The dtype and shape of each array."""
    return {name: f"{x.dtype} {list(x.shape)}" for name, x in arrays.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 1 <= value < 2**31


def _is_finite(value: Any) -> bool:
    number: Any = value  # mypy knows no size of numpy's numbers
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(abs(number) < 1e30)


def _shown(value: Any) -> str:
    """The repr of a value for an error, at most 100 characters."""
    try:
        return repr(value)[:100]
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        return "a number of too many digits"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns all that the readers of damaged files raise into a ValueError that names the file."""
    try:
        yield _existing(path)
    except OSError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a reader in Rust
            raise
        raise ValueError(f"{path}: cannot be read: {str(error)[:300] or type(error).__name__}") from error


def _rows(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on. Copies of the last row follow the end of the array."""
    rows = x[start : start + count]
    return np.concatenate([rows, np.repeat(x[-1:], count - len(rows), axis=0)])


def _existing(path: Path) -> Path:
    """The path of a file. FileNotFoundError if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a folder of export-compiled")
    return path


def _keep_compiled(keep: bool) -> None:
    """Switches jax's cache of compiled programs on or off. The default folder is in the user's cache.

    Compiled programs are native code. A folder that another user owns or could write to is not used.
    """
    if not keep:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(caches, "tiue_jax", "xla")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            trusted = found.st_uid == os.geteuid() and not found.st_mode & 0o022
        except OSError:
            trusted = False
        if trusted:
            jax.config.update("jax_compilation_cache_dir", str(folder))
        else:
            print(f"warning: compiled programs are not kept: {folder} is not your own folder", file=sys.stderr)


def _check_output(out: Path) -> None:
    """Raises ValueError or OSError if no image can be written to `out`."""
    if out.suffix != ".png":
        raise ValueError(f"out must end in .png, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: no folder {out.parent}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{out}: cannot write: no permission")


class _Parser(argparse.ArgumentParser):
    """The parser of argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}, see --help\n")


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, or 2 after an error, which is one line on stderr."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="text of an image; may be repeated")
    out_help = "a .png file; several images become NAME-0.png, NAME-1.png ... (default: %(default)s)"
    add("--out", type=Path, default=Path("sample.png"), help=out_help)
    add("--seed", type=int, default=0, help="0 to 2^32 - 1 (default: %(default)s)")
    add("--num_images_per_prompt", type=int, default=1, help="images of each prompt (default: %(default)s)")
    add("--guidance_scale", type=float, help="for samplers with guidance (default: in compiled.json)")
    add("--no_compile_cache", action="store_true", help="compile again, and keep nothing for the next run")
    args = parser.parse_args(argv[1:])
    try:
        from PIL import Image  # only the command needs Pillow

        _check_output(args.out)
        _keep_compiled(not args.no_compile_cache)
        images = Sampler()(
            args.prompt,
            seed=args.seed,
            num_images_per_prompt=args.num_images_per_prompt,
            guidance_scale=args.guidance_scale,
        )
        for i, image in enumerate(images):
            out = args.out if len(images) == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
            Image.fromarray(image).save(out)
            print(out)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
