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
from collections.abc import Callable, Iterator, Sequence
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
FORMAT = 3
FIELDS = 8  # arguments of the program after the weights
MAX_GUIDANCE = 1e6
MAX_MESSAGE = 600  # characters of an error
BATCH_SIZE = 8  # the largest batch of a program that takes any batch


class Sampler:
    """The compiled sampler in a folder. The default is the folder of this file.

    Attributes:
        manifest: the content of `compiled.json`.

    Raises:
        OSError, ValueError: a file is missing or damaged, the folder has another format or is for other platforms. The
            error is one line that names the file.
    """

    def __init__(self, folder: str | Path | None = None):
        folder = Path(__file__).parent if folder is None else Path(folder)
        self.manifest = read_manifest(folder / MANIFEST)
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.manifest["platforms"]:
            raise ValueError(f"{folder}: compiled for {', '.join(self.manifest['platforms'])}, got {platform}")
        with _reading(folder / TOKENIZER, self.manifest) as path:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.encode("a photo")  # some damage shows only then
        with _reading(folder / PROGRAM.format(platform), self.manifest) as path:
            program = export.deserialize(bytearray(path.read_bytes()))
        with _reading(folder / WEIGHTS, self.manifest) as path:
            weights = load_file(path)
        _check_program(folder / MANIFEST, self.manifest, program.in_avals, weights)
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
        negative_prompt: str | Sequence[str] = "",
    ) -> np.ndarray:
        """Samples images, uint8 [n h w 3]. The images of one prompt follow each other.

        Args:
            prompts: at least one; "" is the unconditional image. A prompt that comes twice gets different images.
            seed: 0 ... 2^32 - 1.
            num_images_per_prompt: at least 1.
            guidance_scale: for samplers with guidance. The default is in `compiled.json`.
            latents: float32 [n h w c], the initial standard normal noise of each image, instead of the seed's.
            negative_prompt: what guidance leads away from, for samplers with guidance: one for all prompts, or a list
                with one for each.

        Raises:
            ValueError: names the argument, its value and what was expected.
            FloatingPointError: names an image with NaN or infinite values.
        """
        manifest = self.manifest
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {seed}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        if guidance_scale is not None and not manifest["guided"]:
            raise ValueError(f"guidance_scale is not for this sampler, compiled without guidance, got {guidance_scale}")
        if guidance_scale is not None and not (
            isinstance(guidance_scale, int | float) and abs(guidance_scale) <= MAX_GUIDANCE
        ):
            raise ValueError(f"guidance_scale must be a number of at most {MAX_GUIDANCE:.0f}, got {guidance_scale!r}")
        negatives = self._negative_prompts(negative_prompt, len(prompts), guidance_scale)
        total = len(prompts) * num_images_per_prompt
        shape = (total, *manifest["latents"])
        if latents is not None and (latents.shape != shape or latents.dtype != np.float32):
            raise ValueError(f"latents must be float32 {list(shape)}, got {latents.dtype} {list(latents.shape)}")

        seen: Counter[str] = Counter()
        tokens, null_tokens, prompt_hashes, image_numbers = [], [], [], []
        for prompt, negative in zip(prompts, negatives, strict=True):
            ids, null_ids = self.tokenize(prompt), self.tokenize(negative)
            for _ in range(num_images_per_prompt):
                tokens.append(ids)
                null_tokens.append(null_ids)
                prompt_hashes.append(zlib.crc32(prompt.encode()))
                image_numbers.append(seen[prompt])
                seen[prompt] += 1
        all_ids, all_null_ids = np.stack(tokens), np.stack(null_tokens)
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
                _rows(all_null_ids, start, batch) if manifest["guided"] else all_null_ids[:1],
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

    def _negative_prompts(
        self, negative_prompt: str | Sequence[str], count: int, guidance_scale: float | None
    ) -> list[str]:
        """The negative prompt of each of `count` prompts. ValueError if it is wrong or would have no effect."""
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != count:
            raise ValueError(f"negative_prompt must be one text or a list of {count}, got a list of {len(negatives)}")
        guided = self.manifest["guided"] and not self.manifest["embeds_guidance"]
        if any(negatives) and not guided:
            raise ValueError("negative_prompt has no effect without guidance, and this sampler has none: leave it out")
        if any(negatives) and guidance_scale is not None and guidance_scale <= 1:
            raise ValueError(f"negative_prompt has no effect at guidance_scale {guidance_scale}, expected above 1")
        return negatives

    def tokenize(self, prompt: str) -> np.ndarray:
        """Token ids int32 [l], padded to the context. Logs a warning for a prompt that is too long, and cuts it."""
        length = self.manifest["context"]
        several = self.manifest["tokens_of_several_vectors"]  # a trained token may stand for several ids
        ids = [one for token in self._tokenizer.encode(prompt).ids for one in several.get(str(token), (token,))]
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


def _one_or_list(texts: list[str]) -> str | list[str]:
    """The text if there is only one, which then is for all prompts."""
    return texts[0] if len(texts) == 1 else texts


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads `compiled.json`. OSError or ValueError with one line on what is missing or wrong."""
    try:
        manifest = json.loads(_existing(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(manifest).__name__}")
    if (found := manifest.get("format")) != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {found!r}; export the sampler again")

    def is_count(value: object) -> bool:
        return type(value) is int and value > 0

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_GUIDANCE

    def is_list(value: object, member: Callable[[object], bool]) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(map(member, value))

    def is_map_of_ids(value: object) -> bool:
        return isinstance(value, dict) and all(
            key.isdecimal() and is_list(ids, lambda one: type(one) is int and one >= 0) for key, ids in value.items()
        )

    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "platforms": ("a list of texts", lambda value: is_list(value, lambda name: isinstance(name, str))),
        "guided": ("true or false", lambda value: isinstance(value, bool)),
        "guidance_scale": (f"a number of at most {MAX_GUIDANCE:.0f}", is_number),
        "batch_size": ("a whole number > 0 or null", lambda value: value is None or is_count(value)),
        "latents": ("three whole numbers > 0", lambda value: is_list(value, is_count) and len(value) == 3),
        "context": ("a whole number > 0", is_count),
        "pad_token_id": ("a whole number >= 0", lambda value: type(value) is int and 0 <= value < 2**31),
        "tokens_of_several_vectors": ("lists of ids by id", is_map_of_ids),
        "crc32": ("a checksum of each file", lambda value: isinstance(value, dict)),
    }
    for name, (what, fits) in expected.items():
        if not fits(manifest.get(name)):
            raise ValueError(f"{path}: {name} must be {what}, got {str(manifest.get(name))[:100]!r}")
    return manifest


@contextlib.contextmanager
def _reading(path: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Yields the path of a file whose checksum is that of the manifest. All errors of reading it name the file.

    Raises:
        OSError, ValueError: the file is missing or damaged. One line that names it.
    """
    expected = manifest["crc32"].get(path.name)
    if (found := checksum(_existing(path))) != expected:
        raise ValueError(f"{path}: damaged or not of this folder: expected the checksum {expected}, got {found}")
    try:
        yield path
    except OSError:
        raise
    except Exception as error:  # the parsers, in Rust and C++, raise many types, also plain Exception
        raise ValueError(f"{path}: cannot be read with jax {jax.__version__}: {error}") from error


def checksum(path: Path) -> int:
    """The CRC-32 of a file. OSError if it cannot be read."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            total = zlib.crc32(block, total)
    return total


def _check_program(path: Path, manifest: dict[str, Any], avals: Sequence[Any], weights: dict[str, np.ndarray]) -> None:
    """Checks that the program takes the weights and the shapes of the manifest. ValueError names what does not fit."""
    of_weights, fields = list(avals[:-FIELDS]), avals[-FIELDS:]
    given = [(name, x.shape, x.dtype) for name, x in sorted(weights.items())]
    if len(given) != len(of_weights):
        raise ValueError(f"{path}: the program takes {len(of_weights)} weights, got {len(given)} in {WEIGHTS}")
    for (name, shape, dtype), wanted in zip(given, of_weights, strict=True):
        if (shape, dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"{path}: weight {name} must be {wanted.str_short()}, got {dtype.name} {list(shape)}")
    batch, context = fields[0].shape
    takes = {
        "batch_size": batch if isinstance(batch, int) else None,
        "context": context,
        "latents": list(fields[-2].shape[1:]),
    }
    for name, value in takes.items():
        if manifest[name] != value:
            raise ValueError(f"{path}: {name} must be {value}, as in the program, got {manifest[name]}")


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
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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
    negative = "what guidance leads away from, for samplers with guidance: one for all prompts, or one for each"
    add("--negative_prompt", action="append", help=negative)
    add("--no_compile_cache", action="store_true", help="compile again, and keep nothing for the next run")
    try:
        args = parser.parse_args(argv[1:])
        from PIL import Image  # only the command needs Pillow

        _check_output(args.out)
        _keep_compiled(not args.no_compile_cache)
        images = Sampler()(
            args.prompt,
            seed=args.seed,
            num_images_per_prompt=args.num_images_per_prompt,
            guidance_scale=args.guidance_scale,
            negative_prompt=_one_or_list(args.negative_prompt or [""]),
        )
        for i, image in enumerate(images):
            out = args.out if len(images) == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
            Image.fromarray(image).save(out)
            print(out)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        message = f"error: {' '.join(str(error).split())}"
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE - 4]} ..."
        print(message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
