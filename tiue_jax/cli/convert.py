"""Converts checkpoints: says what they are, exports, imports, and merges LoRAs.

    tiue convert inspect community.safetensors
    tiue convert export --checkpoint runs/x --out student [--dtype float16] [--verify] [--push_to_hub owner/name]
    tiue convert export-compiled --model emoji-tiue --out compiled
    tiue convert import --file community.safetensors --out teacher
    tiue convert import --file owner/unet --base sd15 --vae vae.safetensors --out teacher
    tiue convert merge-lora --model sd15 --lora style.safetensors --scale 0.8 --out teacher
    tiue convert merge-lora --model sd15 --lora a.safetensors --scale 1 --lora owner/name --scale 0.5 --out teacher
    tiue convert average --model runs/a --model runs/b --weight 0.5 --weight 0.5 --out student

`tiue convert COMMAND --help` describes a command. Exit status: 0 done; 1 written, but --verify found a difference from
PyTorch, or --push_to_hub failed; 2 a wrong argument, file or folder.
"""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, named_argument, parse, print_error, require, subcommand
from tiue_jax.cli.inspect_report import define_inspect, run_inspect
from tiue_jax.convert import export, export_compiled, publish
from tiue_jax.convert.average import average
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.convert.merge_lora import merge_lora
from tiue_jax.models import platforms
from tiue_jax.models.tiling import Tiling
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.sampling.settings import read_key_steps, read_timesteps
from tiue_jax.schedule import PREDICTION_TYPES, SPACINGS
from tiue_jax.temporary import temporary_folder
from tiue_jax.weights.pipeline_folder import DTYPES, STORED_DTYPES

DIFFERENT = NOT_PUSHED = 1  # exit statuses: PyTorch computes something else, or the hub did not take the folder

_A_PIPELINE = "a pipeline: a shipped model or alias, a folder, or a hub repository (required)"
_EMBEDDING = "a textual inversion embedding to add: FILE, TOKEN=FILE, a folder or a hub repository; may be repeated"
_VAE = "an autoencoder in place of the model's: a .safetensors file, a folder, or a hub repository"
_CLIP_SKIP = "last layers of the text encoder to leave out, as in diffusers: 1 is 'Clip skip 2' of other programs"
_PIPELINE_OUT = "the pipeline folder to write, for diffusers and tiue_jax (required)"


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        summary: for the overview.
        define: defines its flags.
        run: runs it and returns the exit status.
        argument: the flag that an argument without a flag's name is for.
    """

    summary: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], int]
    argument: str | None = None


def define_export(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert export`."""
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("checkpoint", None, f"the folder of a training run, or {_A_PIPELINE}", **add)
    flags.DEFINE_string("out", None, _PIPELINE_OUT, **add)
    flags.DEFINE_string("step", "last", "the run's checkpoint: best, last, or a step", **add)
    teacher = (
        "the run's teacher, if it is elsewhere on this machine: a folder or a hub repository; its weights are compared"
    )
    flags.DEFINE_string("teacher", None, teacher, **add)
    weights = "ema: the moving average of the student; params: the last weights, not averaged"
    flags.DEFINE_enum("weights", "ema", list(export.STUDENT_WEIGHTS), weights, **add)
    flags.DEFINE_multi_string("embedding", [], _EMBEDDING, **add)
    flags.DEFINE_bool("lora", False, "also write the run's LoRA teacher, to OUT/lora_teacher", **add)
    clip_skip = f"of a pipeline that is no run: {_CLIP_SKIP}"
    flags.DEFINE_integer("clip_skip", 0, clip_skip, **add)
    flags.DEFINE_enum("dtype", "float32", list(STORED_DTYPES), "dtype of the weights on disk", **add)
    verify = "compare the folder in JAX and in PyTorch, part by part; needs pip install 'tiue-jax[torch]'"
    flags.DEFINE_bool("verify", False, verify, **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)
    push = "push OUT to this repository of the Hugging Face hub, owner/name, with sample images (default: none)"
    flags.DEFINE_string("push_to_hub", None, push, **add)
    license_of = (
        "the hub's identifier of the licence of the weights, such as apache-2.0 (default: the model's, if known)"
    )
    flags.DEFINE_string("license", None, license_of, **add)
    flags.DEFINE_multi_string("prompt", list(publish.PROMPTS), "of the images that are pushed; may be repeated", **add)
    flags.DEFINE_bool("private", False, "make a new repository of the hub private", **add)


def run_export(args: flags.FlagValues) -> int:
    """Writes a student or another pipeline as a folder for PyTorch diffusers.

    Of a training run it writes the student, by default with the EMA weights.
    """
    require(args, "checkpoint", "out")
    if args.verify:
        verify = _verifier()
    if args["teacher"].present:
        require(args, "teacher")
    if args.step not in ("best", "last") and not args.step.isdecimal():
        raise ValueError(f"--step must be best, last or a number, got {args.step!r}")
    if args["push_to_hub"].present:
        publish.check_push(args.push_to_hub, args.license, export.base_of(args.checkpoint).licence)
    elif unused := [name for name in ("license", "prompt", "private") if args[name].present]:
        raise ValueError(f"--{unused[0]} is for --push_to_hub, which is not given")
    if export.is_run(args.checkpoint):
        if args.embedding:
            raise ValueError(f"--embedding is for a pipeline, a run has model.embeddings, got {args.embedding[0]}")
        if args["clip_skip"].present:
            raise ValueError(f"--clip_skip is for a pipeline, got the run {args.checkpoint}, which has model.clip_skip")
        step = export.export_run(
            args.checkpoint,
            args.out,
            step=int(args.step) if args.step.isdecimal() else args.step,
            teacher=args.teacher,
            weights=args.weights,
            lora_teacher=args.lora,
            dtype=args.dtype,
            overwrite=args.overwrite,
        )
        written = f"the student of step {step:,} ({args.weights})"
    else:
        for name in ("step", "teacher", "weights", "lora"):
            if args[name].present:
                raise ValueError(f"--{name} is for the folder of a training run, got --checkpoint={args.checkpoint}")
        kept = {"clip_skip": args.clip_skip, "dtype": args.dtype, "overwrite": args.overwrite}
        export.export_pipeline(args.checkpoint, args.out, embeddings=args.embedding, **kept)
        written = f"the pipeline {args.checkpoint}"
    print(f"{args.out}: {written} in {args.dtype}")
    if args.verify:
        report = verify(args.out)
        print(report.table())
        if not report.passed:
            return DIFFERENT
    if args.push_to_hub:
        try:
            url = publish.push(
                args.out, args.push_to_hub, licence=args.license, prompts=args.prompt, private=args.private
            )
        except publish.PushError as error:
            print_error(error)
            return NOT_PUSHED
        print(f"pushed: {url}")
    return 0


def define_export_compiled(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert export-compiled`."""
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("model", None, _A_PIPELINE, **add)
    flags.DEFINE_string("out", None, "the folder to write: program, weights, tokenizer, sampler.py (required)", **add)
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "the sampler (default: the model's)", **add)
    flags.DEFINE_integer("num_inference_steps", None, "number of steps, K of a student (default: the model's)", **add)
    guidance = "guidance scale of a call that does not give one; up to 1 compiles no guidance (default: the model's)"
    flags.DEFINE_float("guidance_scale", None, guidance, **add)
    flags.DEFINE_enum("timestep_spacing", None, list(SPACINGS), "spacing of the steps (default: the model's)", **add)
    timesteps = "timesteps of the steps, such as 999,749,499,249, instead of a spacing (default: the model's)"
    flags.DEFINE_list("timesteps", None, timesteps, **add)
    keys = "for faster_diffusion: the steps that run the encoder, such as 0,1,2,5,10; one number n is every n-th"
    flags.DEFINE_list("key_steps", None, keys, **add)
    flags.DEFINE_integer("batch_size", None, "images of every call (default: any number)", **add)
    flags.DEFINE_integer("height", None, "of the images, in pixels (default: the model's training size)", **add)
    flags.DEFINE_integer("width", None, "of the images, in pixels (default: the model's training size)", **add)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "dtype of the weights and the computation", **add)
    base = "a model that supplies what --model lacks, if that is one file or has only a UNet (default: none)"
    flags.DEFINE_string("base", None, base, **add)
    vae = f"{_VAE}, or tiny (TAESD) (default: the model's)"
    flags.DEFINE_string("vae", None, vae, **add)
    flags.DEFINE_integer("clip_skip", 0, _CLIP_SKIP, **add)
    flags.DEFINE_enum("vae_dtype", None, list(DTYPES), "dtype of the autoencoder (default: --dtype)", **add)
    flags.DEFINE_multi_string("embedding", [], _EMBEDDING, **add)
    flags.DEFINE_bool("vae_tiling", False, "decode large images in tiles, in the memory of one tile", **add)
    flags.DEFINE_list("platforms", list(export_compiled.PLATFORMS), "platforms that the program runs on", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older compiled sampler in OUT", **add)


def run_export_compiled(args: flags.FlagValues) -> int:
    """Writes the whole sampler as one program (jax.export) that runs without tiue_jax on CPU, CUDA and TPU."""
    require(args, "model", "out")
    tiling = Tiling() if args.vae_tiling else None
    pipe = Pipeline.from_pretrained(
        args.model,
        args.dtype,
        base=args.base,
        vae=args.vae,
        clip_skip=args.clip_skip,
        vae_dtype=args.vae_dtype,
        vae_tiling=tiling,
        embeddings=args.embedding,
    )
    export_compiled.export_compiled(
        pipe,
        args.out,
        batch_size=args.batch_size,
        height=args.height,
        width=args.width,
        platforms=args.platforms,
        overwrite=args.overwrite,
        sampler=args.sampler,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        timestep_spacing=args.timestep_spacing,
        key_steps=read_key_steps(args.key_steps),
        timesteps=read_timesteps(args.timesteps),
    )
    print(f"{args.out}: {args.model} for {', '.join(args.platforms)}; try python {args.out}/sampler.py --help")
    return 0


def define_import(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert import`."""
    add: dict[str, Any] = {"flag_values": values}
    file = "a .safetensors file in the layout of the original repositories; or a folder or repository (required)"
    flags.DEFINE_string("file", None, file, **add)
    flags.DEFINE_string("out", None, _PIPELINE_OUT, **add)
    base = "a model that supplies the parts that are missing (default: tokenizer and configurations of a published one)"
    flags.DEFINE_string("base", None, base, **add)
    flags.DEFINE_string("vae", None, f"{_VAE} (default: the file's)", **add)
    flags.DEFINE_integer("clip_skip", 0, _CLIP_SKIP, **add)
    prediction = "the UNet's output; required for SD 2.x files that do not say it (default: the file's or the base's)"
    flags.DEFINE_enum("prediction_type", None, list(PREDICTION_TYPES), prediction, **add)
    flags.DEFINE_bool("ema", False, "take the UNet's moving average (model_ema.*) in the file", **add)
    flags.DEFINE_enum("dtype", "float32", list(STORED_DTYPES), "dtype of the weights on disk", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_import(args: flags.FlagValues) -> int:
    """Writes a pipeline folder from a community checkpoint in one file, of Stable Diffusion 1.x or 2.x.

    A file without an autoencoder or a text encoder, and a folder or repository with only a UNet, need --base.
    """
    require(args, "file", "out")
    imported = import_single_file(
        args.file,
        args.out,
        base=args.base,
        vae=args.vae,
        clip_skip=args.clip_skip,
        prediction_type=args.prediction_type,
        ema=args.ema,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    for note in imported.notes:
        print(f"{args.file}: {note}")
    like = f", like {imported.kind}" if imported.kind else ""
    print(f"{args.out}: {args.file}{like}, in {args.dtype}")
    return 0


def define_merge_lora(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert merge-lora`."""
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("model", None, _A_PIPELINE, **add)
    names = "a .safetensors file, a folder, a hub repository, or owner/name/file"
    lora = f"a LoRA, LoHa, LoKr or DoRA: {names}; may be repeated (required)"
    flags.DEFINE_multi_string("lora", None, lora, **add)
    flags.DEFINE_string("out", None, _PIPELINE_OUT, **add)
    scale = "factor of the LoRA, one for each --lora; 1 is the LoRA as it was trained (default: 1.0)"
    flags.DEFINE_multi_float("scale", None, scale, **add)
    flags.DEFINE_enum("dtype", "float32", list(STORED_DTYPES), "dtype of the weights on disk", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_merge_lora(args: flags.FlagValues) -> int:
    """Writes a pipeline with one or several LoRAs merged into its UNet and its text encoder."""
    require(args, "model", "lora", "out")
    scales = args.scale or [1.0] * len(args.lora)
    count = merge_lora(args.model, args.lora, args.out, scale=scales, dtype=args.dtype, overwrite=args.overwrite)
    merged = " and ".join(f"{lora} at scale {scale:g}" for lora, scale in zip(args.lora, scales, strict=True))
    print(f"{args.out}: {args.model} with {merged} in {count} weights, in {args.dtype}")
    return 0


def define_average(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert average`."""
    add: dict[str, Any] = {"flag_values": values}
    model = "a student: a folder, a shipped model, a hub repository, or the folder of a training run; give several"
    flags.DEFINE_multi_string("model", None, f"{model} (required)", **add)
    step = "of a training run: the checkpoint, best, last, or a step; one for all, or one for each --model"
    flags.DEFINE_multi_string("step", ["last"], step, **add)
    flags.DEFINE_multi_float("weight", [], "one for each --model (default: all the same)", **add)
    flags.DEFINE_string("out", None, _PIPELINE_OUT, **add)
    flags.DEFINE_enum("dtype", "float32", list(STORED_DTYPES), "dtype of the weights on disk", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_average(args: flags.FlagValues) -> int:
    """Writes a pipeline whose UNet is the weighted mean of several students: of two runs, or of checkpoints of one."""
    require(args, "model", "out")
    steps = args.step * len(args.model) if len(args.step) == 1 else args.step
    if len(steps) != len(args.model):
        raise ValueError(f"expected one --step, or one for each of {len(args.model)} models, got {len(steps)}")
    with temporary_folder(tempfile.gettempdir(), "tiue-jax") as aside:
        models = []
        for number, (name, step) in enumerate(zip(args.model, steps, strict=True)):
            if export.is_run(name):
                student = f"{aside}/{number}"
                export.export_run(name, student, step=int(step) if step.isdecimal() else step)
                models.append(student)
            else:
                models.append(name)
        average(models, args.out, weights=args.weight, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.out}: the mean of {len(models)} students, in {args.dtype}")
    return 0


def define_import_inception(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert import-inception`."""
    add: dict[str, Any] = {"flag_values": values}
    weights = "torch-fidelity's file weights-inception-2015-12-05-6726825d.pth (required)"
    flags.DEFINE_string("file", None, weights, **add)
    flags.DEFINE_string("out", None, "the folder to write, an --extractor of tiue evaluate (required)", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older folder of this kind", **add)


def run_import_inception(args: flags.FlagValues) -> int:
    """Writes the Inception-v3 of the FID as a folder of safetensors. Needs pip install 'tiue-jax[torch]'."""
    require(args, "file", "out")
    try:
        from tiue_jax.convert.import_inception import import_inception
    except ModuleNotFoundError as error:
        raise ValueError(f"import-inception needs PyTorch ({error}): pip install 'tiue-jax[torch]'") from error
    import_inception(args.file, args.out, overwrite=args.overwrite)
    print(f"{args.out}: Inception-v3 of {args.file}")
    return 0


def _verifier() -> Callable[..., Any]:
    """Imports the function that compares with PyTorch. ValueError if PyTorch is not installed."""
    try:
        from tiue_jax.convert.verify import verify
    except ModuleNotFoundError as error:
        raise ValueError(f"--verify needs PyTorch ({error}): pip install 'tiue-jax[torch]'") from error
    return verify


COMMANDS = {
    "average": Command("write the weighted mean of several students", define_average, run_average),
    "export": Command("write a student or a pipeline as a folder for diffusers", define_export, run_export),
    "export-compiled": Command(
        "write a sampler as a program that runs without tiue_jax", define_export_compiled, run_export_compiled
    ),
    "import": Command("read a checkpoint in one file or in parts, write a pipeline folder", define_import, run_import),
    "import-inception": Command(
        "read the Inception-v3 of the FID, write a folder for tiue evaluate",
        define_import_inception,
        run_import_inception,
    ),
    "inspect": Command(
        "say what a file, a folder or a repository is, and what reads it", define_inspect, run_inspect, "model"
    ),
    "merge-lora": Command("add a LoRA to a pipeline, write a new folder", define_merge_lora, run_merge_lora),
}


def main(argv: Sequence[str]) -> int:
    """Runs a subcommand. Returns the exit status; an error is one line on stderr."""
    platforms.leave_out_missing_tpu()
    width = max(map(len, COMMANDS))
    overview = "\n".join(f"    {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    try:
        name = subcommand(argv, list(COMMANDS), f"{__doc__}\nCommands:\n{overview}")
        if name is None:
            return 0
        command = COMMANDS[name]
        given = named_argument(argv[2:], command.argument)
        args = parse([f"{argv[0]} {name}", *given], command.define, inspect.cleandoc(command.run.__doc__ or ""))
        return 0 if args is None else command.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, flags.Error) as error:
        print_error(error)
        return BAD_INPUT
