"""Malformed inputs from a seed: mutations of good files, settings and flags, and how the product answers them.

    python -m tests.malformed --count 2000 --seed 1

An answer is good if it is success, or an error of one line and at most 600 characters that names the file, the field or
the setting, and if nothing new is left on the disk. Everything runs in this process. Images are not computed.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags

from tests.good_inputs import Inputs
from tiue_jax import compile_cache
from tiue_jax.cli import embed, prepare, sample, train
from tiue_jax.cli.command_line import MAX_MESSAGE
from tiue_jax.models import lora
from tiue_jax.pipeline import Pipeline
from tiue_jax.training.settings import setting_annotations

SECONDS = 60  # an answer that takes longer counts as a hang
REMOVED = "removed"
VALUES = {  # JSON, which Python also reads
    "text": '"x"',
    "a number as text": '"8"',
    "empty text": '""',
    "long text": json.dumps("x y " * 3000),
    "two lines": '"a\\nb"',
    "half a character": '"\\ud800"',
    "null": "null",
    "true": "true",
    "list": "[1, 2]",
    "empty list": "[]",
    "list of null": "[null]",
    "object": '{"a": 1}',
    "empty object": "{}",
    "NaN": "NaN",
    "infinity": "Infinity",
    "1.5": "1.5",
    "8.0": "8.0",
    "0": "0",
    "-1": "-1",
    "10^9": "1000000000",
    "10^12": "1000000000000",
    "401 digits": "1" * 401,
    "5,000 digits": "1" * 5000,
    "100,000 brackets": "[" * 100_000 + "]" * 100_000,
    REMOVED: "",
}
FLAG_VALUES = ("", *"x None nan inf 1.5 0 -1 8 1000000 1000000000 [] \u00e9".split(), "1" * 401, "1" * 5000)
_MARK = "@@mutated@@"


class Case(NamedTuple):
    """A malformed input.

    Attributes:
        name: what is malformed.
        names: the texts of which an error must hold one.
        path: the file that is changed; None for a setting or a flag.
        content: of the file, or a function that puts something else at its path.
        run: reads the input.
    """

    name: str
    names: tuple[str, ...]
    path: Path | None
    content: bytes | Callable[[Path], None]
    run: Callable[[], object]


class Answer(NamedTuple):
    """The result of a case: "success", "error", or the name of a fault; and the error or the traceback."""

    kind: str
    text: str


class CommandError(Exception):
    """The command ended with a status that is not 0; the message is what it printed on stderr."""


def mutated(content: Any, path: tuple[Any, ...], raw: str) -> bytes:
    """The JSON of `content` with other JSON at a path, or with nothing there if `raw` is empty."""
    copy = json.loads(json.dumps(content))
    parent = copy
    for part in path[:-1]:
        parent = parent[part]
    if raw:
        parent[path[-1]] = _MARK
    else:
        del parent[path[-1]]
    return json.dumps(copy).replace(json.dumps(_MARK), raw).encode()


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value. Of a large object, such as a vocabulary, only of the first three."""
    if isinstance(value, dict | list):
        entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, inner in entries[:3] if len(entries) > 100 else entries:
            yield (*path, key)
            yield from paths_in(inner, (*path, key))


def damages(content: bytes) -> dict[str, bytes | Callable[[Path], None]]:
    """Damages of any file, by name."""
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "an empty list": b"[]",
        "other bytes": b"\xff\xfe\x00" * 50,
        "zeros": bytes(len(content)),
        "brackets": b"[" * 100_000,
        "a byte changed": content[:9] + bytes([content[9] ^ 255]) + content[10:] if len(content) > 10 else b"",
        "a folder": Path.mkdir,
        "a link to itself": link_to_itself,
        "a link to /dev/zero": link_to_zeros,
        "gone": nothing,
    }


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nothing(path: Path) -> None:
    assert not path.exists()


SAMPLE_FLAGS = tuple(
    "model prompt_file out num_images_per_prompt seed latents num_inference_steps timestep_spacing key_steps dtype vae "
    "batch_size mesh_step height width columns upscale tile_sample_min_size sampler guidance_scale".split()
)


def cases(inputs: Inputs) -> list[Case]:
    """All malformed inputs that differ from a good one in one place."""
    found = list(_settings())
    found += _flags(inputs, sample.main, SAMPLE_FLAGS, ["sample", "--model", str(inputs.model), "--prompt", "red"])
    data = ["--prompts", str(inputs.prompts), "--out", str(inputs.root / "made")]
    found += _flags(inputs, embed.main, ("batch_size", "out", "model"), ["embed", "--model", str(inputs.model), *data])
    found += _flags(inputs, prepare.main, ("out", "prompts"), ["prepare", *data])
    for folder, run in inputs.readers().items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "sampler.py":
                found += _damaged(inputs, path, run)
    found += _lora_metadata(inputs)
    return found


def _damaged(inputs: Inputs, path: Path, run: Callable[[], object]) -> Iterator[Case]:
    content, short = path.read_bytes(), str(path.relative_to(inputs.root))
    for name, damage in damages(content).items():
        yield Case(f"{short}: {name}", (path.name, str(path.parent)), path, damage, run)
    if path.suffix == ".json":
        value = json.loads(content)
        for where in paths_in(value):
            names = (path.name, str(path.parent), *map(str, where))
            for kind, raw in VALUES.items():
                name = f"{short}: {'.'.join(map(str, where))} is {kind}"
                yield Case(name, names, path, mutated(value, where, raw), run)


def _lora_metadata(inputs: Inputs) -> Iterator[Case]:
    content = inputs.lora.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    fields = json.loads(header["__metadata__"][lora.METADATA_KEY])
    fields |= {"unet.alpha_pattern": {"to_q": 2}, "unet.rank_pattern": {"to_v": 2}, "unet.use_rslora": True}
    for where in paths_in(fields):
        for kind, raw in VALUES.items():
            written = mutated(fields, where, raw).decode()
            metadata = header["__metadata__"] | {lora.METADATA_KEY: written}
            new = json.dumps(header | {"__metadata__": metadata}).encode()
            whole = len(new).to_bytes(8, "little") + new + content[8 + length :]
            yield Case(f"LoRA metadata: {where} is {kind}", (str(inputs.lora),), inputs.lora, whole, inputs.read_lora)


def _settings() -> Iterator[Case]:
    for setting in setting_annotations():
        for value in (*FLAG_VALUES, "(1, 2)", "('a', None)", "{}", "((((" * 1000):
            argv = ["train.py", "--config", "emoji_tiue", "--workdir", "x", f"--config.{setting}={value}"]
            yield Case(f"--config.{setting}={value[:20]}", (setting,), None, b"", _reads_flags(argv))


def _flags(inputs: Inputs, main: Callable[[list[str]], int], names: tuple[str, ...], argv: list[str]) -> Iterator[Case]:
    for name in names:
        for value in (*FLAG_VALUES, "nowhere/x", "/dev/zero"):
            if value == "1000000" and name in ("num_images_per_prompt", "batch_size"):
                continue  # a million tiny images fit into memory, and it is no fault to begin with them
            arguments = [*argv, f"--{name}", value]
            if main is sample.main and name != "out":
                arguments += ["--out", str(inputs.root / "made.png")]
            about = f"{argv[0]} --{name} {value[:20]}"
            yield Case(about, (name, value[:50] or "''"), None, b"", _runs(main, arguments))


def _reads_flags(argv: list[str]) -> Callable[[], object]:
    return lambda: train.read_flags(argv)


def _runs(main: Callable[[list[str]], int], argv: list[str]) -> Callable[[], object]:
    def run() -> None:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(argv)
            except SystemExit as error:  # of argparse
                status = error.code
        if status:
            raise CommandError(printed.getvalue())

    return run


def _no_images(pipe: Pipeline, settings: Any) -> Callable[..., Any]:
    """Stands in for Pipeline.program: black images of the right size, without a compilation."""

    def run(params: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        n, height, width, _ = batch.latents.shape
        factor = pipe.vae.cfg.factor
        return np.zeros((n, height * factor, width * factor, 3), np.uint8), np.ones(n, bool)

    return run


@contextlib.contextmanager
def malformed(case: Case) -> Iterator[None]:
    """Puts the malformed file in its place, and the good one back afterwards."""
    if case.path is None:
        yield
        return
    good = case.path.read_bytes()
    case.path.unlink()
    try:
        if isinstance(case.content, bytes):
            case.path.write_bytes(case.content)
        else:
            case.content(case.path)
        yield
    finally:
        if case.path.is_dir() and not case.path.is_symlink():
            case.path.rmdir()
        else:
            case.path.unlink(missing_ok=True)
        case.path.write_bytes(good)


class HangError(BaseException):
    """There is no answer. It is no Exception, so that no command takes it for an error of its input."""


def _hang(*_: object) -> None:
    raise HangError(f"no answer in {SECONDS} s")


def answer(case: Case, root: Path) -> Answer:
    """Reads a malformed input and judges the answer."""
    with malformed(case):
        before = sorted(root.rglob("*"))
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
        try:
            case.run()
            return Answer("success", "")
        except CommandError as error:
            text, command = str(error), True
        except HangError as error:
            return Answer("hang", str(error))
        except (ValueError, OSError, FloatingPointError, flags.Error) as error:
            text, command = f"error: {error}\n", False
        except BaseException as error:  # also of code in Rust
            if isinstance(error, KeyboardInterrupt):
                raise
            return Answer("traceback", traceback.format_exc())
        finally:
            signal.alarm(0)
        left = sorted(set(root.rglob("*")) - set(before))
    if not text.startswith("error: ") or text.count("\n") != 1:
        return Answer("not one line", text)
    if command and len(text) > MAX_MESSAGE + 1:
        return Answer("too long", text)
    if not any(name in text[:MAX_MESSAGE] for name in case.names):
        return Answer("does not name it", text)
    if left:
        return Answer("files left", f"{left}: {text}")
    return Answer("error", text.strip())


def in_turn(every: list[Case], rng: random.Random) -> Iterator[Case]:
    """The cases in random order, one of each file and command in turn: a vocabulary alone would have a thousand."""
    groups: dict[object, list[Case]] = {}
    for case in rng.sample(every, len(every)):
        groups.setdefault(case.path or case.name.split("=")[0], []).append(case)
    for row in itertools.zip_longest(*groups.values()):
        yield from filter(None, row)


def answers(inputs: Inputs, every: list[Case], count: int, seed: int) -> Iterator[tuple[Case, Answer]]:
    """Chooses `count` of the cases by a seed, and yields each with its answer."""
    chosen = itertools.islice(in_turn(every, random.Random(seed)), count)
    here = inputs.root / "here"  # relative outputs, such as --out 8, are written there
    here.mkdir()
    replaced = mock.patch.object(Pipeline, "program", _no_images), mock.patch.object(compile_cache, "enable")
    with contextlib.chdir(here), replaced[0], replaced[1]:
        for case in chosen:
            yield case, answer(case, inputs.root)
            for made in (inputs.root / "made.png", inputs.root / "made", *here.iterdir()):
                if made.exists():
                    shutil.rmtree(made) if made.is_dir() else made.unlink()


def main() -> int:
    """Prints the number of each kind of answer, and every fault. Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="text in the name of the case")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    kinds: collections.Counter[str] = collections.Counter()
    slowest, longest = (0.0, ""), 0
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        every = [case for case in cases(inputs) if args.only in case.name]
        began = time.monotonic()
        for case, given in answers(inputs, every, args.count, args.seed):
            kinds[given.kind] += 1
            slowest = max(slowest, (time.monotonic() - began, case.name))
            began = time.monotonic()
            if given.kind == "error":
                longest = max(longest, len(given.text))
            elif given.kind != "success":
                print(f"{given.kind}: {case.name}\n    {given.text[-1500:]}", flush=True)
    print(f"{kinds.total()} inputs: {dict(kinds)}; longest error {longest}; slowest {slowest[0]:.1f} s: {slowest[1]}")
    return int(set(kinds) - {"success", "error"} != set())


if __name__ == "__main__":
    sys.exit(main())
