"""Measures how good the images of models are: Fréchet distances, KID, CMMD, precision, recall, CLIP scores and others.

    tiue evaluate --model emoji-tiue --model emoji --prompt_file prompts.txt --out evaluation
    tiue evaluate --model runs/x --prompt_file coco.txt --reference val2014/ --protocol coco30k-dmd2
        --extractor inception/ --extractor facebook/dinov2-large --out evaluation
    tiue evaluate --model sd21-base --prompt_file coco.txt --guidance_scales 1,2,3,4.5,7.5 --out curve
    tiue evaluate compare a/results.json b/results.json
    tiue evaluate statistics --reference val2014/ --extractor inception/ --resize 256 --out val2014.npz
    tiue evaluate curves --run runs/x --run healthy --out curves.svg

Writes results.json, report.html and, for each model, the images and their features to --out. The same command goes on
where a killed one stopped. `compare` shows results of one protocol side by side. `statistics` writes those of real
images to a file, which --reference takes. `curves` lays the curves of a training run over those of others.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from tiue_jax import compile_cache
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, parse, print_error, require
from tiue_jax.convert import export
from tiue_jax.data.prompt_files import read_texts
from tiue_jax.evaluate import compare, curves, extractors, reference
from tiue_jax.evaluate.pixels import FILTERS, Resize
from tiue_jax.evaluate.protocols import PROTOCOLS, Protocol
from tiue_jax.evaluate.report import write_report
from tiue_jax.evaluate.run import RESULTS, Model, evaluate
from tiue_jax.models import platforms
from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.temporary import temporary_folder
from tiue_jax.training.events import write_csv
from tiue_jax.weights.pipeline_folder import DTYPES

_SPLIT = "the split of a --reference of tensorflow-datasets"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    add: dict[str, Any] = {"flag_values": values}
    model = "a shipped model or alias, a folder, a hub repository, or the folder of a training run; may be repeated"
    flags.DEFINE_multi_string("model", None, f"{model} (required)", **add)
    prompt_file = "text with a prompt a line, or CSV, JSON and the other formats of `tiue data prepare` (required)"
    flags.DEFINE_string("prompt_file", None, prompt_file, **add)
    flags.DEFINE_string("field", None, "the prompt's field or column in --prompt_file, such as caption", **add)
    flags.DEFINE_string("out", None, "the folder to write (required)", **add)
    reference = "real images: a folder, also of tensorflow-datasets, a .npy file, or a .npz file of statistics"
    flags.DEFINE_string("reference", None, f"{reference}; without it distances are left out", **add)
    flags.DEFINE_string("reference_split", "validation", _SPLIT, **add)
    extractor = "a network: emoji-clip, or a folder or hub repository of CLIP, DINOv2 or Inception-v3; may be repeated"
    flags.DEFINE_multi_string("extractor", [extractors.SHIPPED_CLIP], extractor, **add)
    flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "a published protocol; flags below replace its values", **add)
    flags.DEFINE_integer("num_images", None, "number of images; by default all prompts", **add)
    flags.DEFINE_integer("num_images_per_prompt", None, "number of images of each prompt; by default 1", **add)
    flags.DEFINE_integer("seed", 0, "of the noise of all images", **add)
    flags.DEFINE_integer("resize", None, "side in pixels to which all images are resized; by default none", **add)
    flags.DEFINE_enum("resize_filter", None, list(FILTERS), "filter of the resize; by default lanczos", **add)
    inception = "resize before Inception-v3; by default clean"
    flags.DEFINE_enum("inception_resize", None, list(extractors.INCEPTION_RESIZES), inception, **add)
    flags.DEFINE_string("prompt_prefix", None, "begins every prompt for the CLIP score, not for the image", **add)
    flags.DEFINE_integer("k", None, "neighbours of precision and recall; by default 5", **add)
    scales = "guidance scales, one point of the plot for each; by default the model's"
    flags.DEFINE_list("guidance_scales", [], scales, **add)
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "by default the model's sampler", **add)
    flags.DEFINE_integer("num_inference_steps", None, "number of steps; by default the model's", **add)
    flags.DEFINE_integer("height", None, "of the images, in pixels; by default the model's training size", **add)
    flags.DEFINE_integer("width", None, "of the images, in pixels; by default the model's training size", **add)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "dtype of the models", **add)
    flags.DEFINE_string("step", "last", "of a training run: the checkpoint, best, last, or a step", **add)
    flags.DEFINE_bool("keep_images", True, "write the images; otherwise only their features and thumbnails", **add)


def run(args: flags.FlagValues) -> None:
    """Evaluates the models, writes the results and the report, and prints the table.

    Raises:
        ValueError, OSError: an argument or a file is wrong.
        FloatingPointError: an image has values that are NaN or infinite.
    """
    require(args, "model", "prompt_file", "out")
    prompts = read_texts(args.prompt_file, args.field)
    compile_cache.enable()
    with temporary_folder(tempfile.gettempdir(), "tiue-jax") as aside:
        models = [_model(name, args.step, aside / str(i), args.model) for i, name in enumerate(args.model)]
        results, points = evaluate(
            models,
            prompts,
            args.out,
            protocol=read_protocol(args),
            extractor_sources=args.extractor,
            reference_path=args.reference,
            reference_split=args.reference_split,
            guidance_scales=_numbers(args.guidance_scales),
            sampling={"sampler": args.sampler, "num_inference_steps": args.num_inference_steps},
            dtype=args.dtype,
            keep_images=args.keep_images,
            seed=args.seed,
        )
    report = write_report(args.out, results, points, list(dict.fromkeys(prompts)))
    show([results])
    print(f"{Path(args.out) / RESULTS} and {report}: {results['num_images']:,} images of {len(points)} models")


def define_statistics(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue evaluate statistics`."""
    add: dict[str, Any] = {"flag_values": values}
    real = "real images: a folder, also of tensorflow-datasets, or a .npy file (required)"
    flags.DEFINE_string("reference", None, real, **add)
    flags.DEFINE_string("reference_split", "validation", _SPLIT, **add)
    flags.DEFINE_string("extractor", None, "the network, as for tiue evaluate (required)", **add)
    flags.DEFINE_string("out", None, "the .npz file to write (required)", **add)
    flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "a published protocol; flags below replace its values", **add)
    flags.DEFINE_integer("resize", None, "side in pixels to which the images are resized; by default none", **add)
    flags.DEFINE_enum("resize_filter", None, list(FILTERS), "filter of the resize; by default lanczos", **add)
    inception = "resize before Inception-v3; by default clean"
    flags.DEFINE_enum("inception_resize", None, list(extractors.INCEPTION_RESIZES), inception, **add)


def run_statistics(args: flags.FlagValues) -> None:
    """Writes the mean and covariance of the features of real images, and the features, to a file.

    Raises:
        ValueError, OSError: an argument or an image is wrong, or the file cannot be written.
    """
    require(args, "reference", "extractor", "out")
    if not args.out.endswith(".npz"):
        raise ValueError(f"--out must end in .npz, got {args.out!r}")
    if args.reference.endswith(".npz"):
        raise ValueError(f"--reference must be real images, a folder or a .npy file, got statistics: {args.reference}")
    protocol = read_protocol(args)
    compile_cache.enable()
    extractor = extractors.load(args.extractor, protocol.inception_resize)
    real = reference.read(args.reference, extractor, protocol.reference_resize, args.reference_split)
    reference.save_statistics(args.out, real, extractor, protocol.reference_resize)
    print(f"{args.out}: {real.statistics.images:,} images, {len(real.statistics.mean)} features of {args.extractor}")


def define_curves(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue evaluate curves`."""
    add: dict[str, Any] = {"flag_values": values}
    shipped = ", ".join(curves.names())
    run = f"the folder of a training run, a .csv file that --csv wrote, or a shipped one: {shipped}; may be repeated"
    flags.DEFINE_multi_string("run", None, f"{run} (required)", **add)
    flags.DEFINE_string("out", None, "the .svg file to write", **add)
    flags.DEFINE_string("csv", None, "a .csv file to write, with all curves of the first --run", **add)
    tag = "plots the tags that begin with this, such as health/; may be repeated; by default a choice"
    flags.DEFINE_multi_string("tag", [], tag, **add)


def run_curves(args: flags.FlagValues) -> None:
    """Lays the curves of training runs over each other in one image, or writes those of a run to a CSV file.

    docs/health.md says what the shipped curves are, and how to read them.

    Raises:
        ValueError, OSError: an argument or a file is wrong, or a file cannot be written.
    """
    require(args, "run")
    for name in ("out", "csv"):
        ending = {"out": ".svg", "csv": ".csv"}[name]
        if (path := getattr(args, name)) is not None and not path.endswith(ending):
            raise ValueError(f"--{name} must end in {ending}, got {path!r}")
    if args.out is None and args.csv is None:
        raise ValueError("--out or --csv is missing, see --help")
    labels = [Path(source).stem for source in args.run]
    read = {
        source if labels.count(label) > 1 else label: curves.read(source)
        for source, label in zip(args.run, labels, strict=True)
    }
    if args.csv is not None:
        write_csv(args.csv, next(iter(read.values())))
        print(f"{args.csv}: the curves of {args.run[0]}")
    if args.out is not None:
        tags = curves.choose_tags(list(read.values()), args.tag)
        curves.write_svg(args.out, read, tags)
        print(f"{args.out}: {len(tags)} plots of {', '.join(read)}")


def _model(name: str, step: str, aside: Path, names: Sequence[str]) -> Model:
    """A model of the command line. The student of a training run is written to the folder `aside` first."""
    label = Path(name).name
    if sum(Path(other).name == label for other in names) > 1:
        label = name.strip("/").replace("/", "--")
    if not export.is_run(name):
        return Model(name, label, name)
    number = export.export_run(name, aside, step=int(step) if step.isdecimal() else step)
    return Model(str(aside), f"{label}-{number}", f"{name}, step {number}")


def read_protocol(args: flags.FlagValues) -> Protocol:
    """The protocol of the command line: a preset, with the values of the flags that are given.

    Raises:
        ValueError: a value is out of range.
    """
    preset = Protocol() if args.protocol is None else PROTOCOLS[args.protocol]
    names = ("num_images", "num_images_per_prompt", "inception_resize", "prompt_prefix", "k", "height", "width")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if name in args}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("resize", "reference_resize"):
        old: Resize = getattr(preset, name)
        size = old.size if args.resize is None else args.resize
        given[name] = Resize(size, args.resize_filter or old.filter, old.crop)
    if args.resize_filter is not None and given["resize"].size is None and given["reference_resize"].size is None:
        raise ValueError(f"--resize_filter {args.resize_filter} has nothing to resize: give --resize, too")
    changed = {name for name, value in given.items() if value != getattr(preset, name)}
    if args.protocol is not None and changed:
        given |= {"name": f"{preset.name}, with another {' and '.join(sorted(changed))}"}
    return dataclasses.replace(preset, **given)


def _numbers(texts: Sequence[str]) -> list[float]:
    """Guidance scales. Raises ValueError for a text that is not a number."""
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--guidance_scales must be numbers such as 1,2,3, got {','.join(texts)!r}") from error


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints the tables of results, and the notes."""
    console = Console()
    for extractor in results[0]["extractors"]:
        console.print(compare.table(extractor, results))
    notes = dict.fromkeys(note for one in results for point in one["points"] for note in point["notes"])
    for note in notes:
        print(f"note: {note}")


# The commands beside the evaluation, and `compare`, which takes no flags.
COMMANDS = {"statistics": (define_statistics, run_statistics), "curves": (define_curves, run_curves)}


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, 2 after an error of one line on stderr, or 130 after Ctrl-C."""
    platforms.leave_out_missing_tpu()
    try:
        if len(argv) > 1 and argv[1] == "compare":
            show(compare.read_comparable(argv[2:]))
            return 0
        if len(argv) > 1 and argv[1] in COMMANDS:
            define, run_command = COMMANDS[argv[1]]
            args = parse([f"{argv[0]} {argv[1]}", *argv[2:]], define, run_command.__doc__ or "")
            if args is not None:
                run_command(args)
            return 0
        args = parse(argv, define_flags, __doc__)
        if args is not None:
            run(args)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, flags.Error) as error:
        print_error(error)
        return BAD_INPUT
