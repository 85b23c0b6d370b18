"""Checkpoints in and out.

    tiue convert export --checkpoint runs/x --out student [--dtype float16] [--verify]
    tiue convert export-compiled --model emoji-tiue --out compiled
    tiue convert import --file community.safetensors --out teacher
    tiue convert merge-lora --model sd15 --lora style.safetensors --scale 0.8 --out teacher

`tiue convert COMMAND --help` says more. Exit status: 0 done; 1 written, but PyTorch computes something
else; 2 a wrong argument, file or folder.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from tiue_jax.cli.command_line import BAD_INPUT, parse, print_error, require, subcommand
from tiue_jax.convert import export, export_compiled
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.convert.merge_lora import merge_lora
from tiue_jax.models.tiling import Tiling
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.samplers import SAMPLERS
from tiue_jax.sampling.settings import read_key_steps
from tiue_jax.schedule import PREDICTION_TYPES, SPACINGS
from tiue_jax.weights.pipeline_folder import DTYPES

DIFFERENT = 1  # an exit status


class Command(NamedTuple):
    """A subcommand: its help, what defines its flags, and what runs it and returns the exit status."""

    help: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], int]


def define_export(f: flags.FlagValues) -> None:
    add: dict[str, Any] = {"flag_values": f}
    flags.DEFINE_string("checkpoint", None, "a run's folder; or a pipeline: shipped, a folder, from the hub", **add)
    flags.DEFINE_string("out", None, "folder to write, for diffusers and for tiue_jax", **add)
    flags.DEFINE_integer("step", None, "of a run: which checkpoint, the newest by default", **add)
    flags.DEFINE_enum("weights", "ema", list(export.WEIGHTS), "of a run: the moving average, or not averaged", **add)
    flags.DEFINE_bool("lora", False, "of a run: also write its LoRA teacher, to OUT/lora_teacher", **add)
    flags.DEFINE_enum("dtype", "float32", list(export.DTYPES), "of the weights on disk", **add)
    flags.DEFINE_bool("verify", False, "compare with PyTorch, part by part; needs pip install 'tiue-jax[torch]'", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_export(args: flags.FlagValues) -> int:
    """Writes a student or a pipeline as a folder for PyTorch diffusers, EMA weights by default."""
    require(args, "checkpoint", "out")
    if args.verify:
        verify = _verifier()
    if export.is_run(args.checkpoint):
        how = {"step": args.step, "weights": args.weights, "lora_teacher": args.lora}
        step = export.export_run(args.checkpoint, args.out, **how, dtype=args.dtype, overwrite=args.overwrite)
        what = f"the student of step {step:,} ({args.weights})"
    else:
        for name in ("step", "weights", "lora"):
            if args[name].present:
                raise ValueError(f"--{name} is for a run of train.py, and {args.checkpoint!r} is none")
        export.export_pipeline(args.checkpoint, args.out, dtype=args.dtype, overwrite=args.overwrite)
        what = f"the pipeline {args.checkpoint}"
    print(f"{args.out}: {what} in {args.dtype}")
    if not args.verify:
        return 0
    report = verify(args.out)
    print(report.table())
    return 0 if report.passed else DIFFERENT


def define_export_compiled(f: flags.FlagValues) -> None:
    add: dict[str, Any] = {"flag_values": f}
    flags.DEFINE_string("model", None, "a pipeline: an alias, a folder, from the hub", **add)
    flags.DEFINE_string("out", None, "folder to write: program, weights, tokenizer, sampler.py", **add)
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "the model's own by default", **add)
    flags.DEFINE_integer("num_inference_steps", None, "the model's own by default", **add)
    flags.DEFINE_float("guidance_scale", None, "what is guided with where a call does not say; 1 compiles none", **add)
    flags.DEFINE_enum("timestep_spacing", None, list(SPACINGS), "the model's own by default", **add)
    flags.DEFINE_list("key_steps", None, "for faster_diffusion, as to sample.py", **add)
    flags.DEFINE_integer("batch_size", None, "pictures of every call; any by default", **add)
    flags.DEFINE_integer("height", None, "in pixels; the model's own by default", **add)
    flags.DEFINE_integer("width", None, "in pixels; the model's own by default", **add)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of weights and computation", **add)
    flags.DEFINE_string("vae", None, "another autoencoder than the model's: tiny (TAESD), or as --model", **add)
    flags.DEFINE_enum("vae_dtype", None, list(DTYPES), "of the autoencoder; --dtype by default", **add)
    flags.DEFINE_bool("vae_tiling", False, "decode large pictures in tiles, in the memory of one tile", **add)
    flags.DEFINE_list("platforms", list(export_compiled.PLATFORMS), "where it is to run", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older compiled sampler in OUT", **add)


def run_export_compiled(args: flags.FlagValues) -> int:
    """Writes the whole sampler as one program (jax.export) that runs on CPU, CUDA and TPU without tiue_jax."""
    require(args, "model", "out")
    tiling = Tiling() if args.vae_tiling else None
    pipe = Pipeline.from_pretrained(args.model, args.dtype, vae=args.vae, vae_dtype=args.vae_dtype, vae_tiling=tiling)
    sampling = ("sampler", "num_inference_steps", "guidance_scale", "timestep_spacing")
    names = (*sampling, "batch_size", "height", "width", "platforms", "overwrite")
    how = {name: getattr(args, name) for name in names}
    export_compiled.export_compiled(pipe, args.out, key_steps=read_key_steps(args.key_steps), **how)
    print(f"{args.out}: {args.model} for {', '.join(args.platforms)}; try python {args.out}/sampler.py --help")
    return 0


def define_import(f: flags.FlagValues) -> None:
    add: dict[str, Any] = {"flag_values": f}
    flags.DEFINE_string("file", None, "a .safetensors file in the original repositories' layout", **add)
    flags.DEFINE_string("out", None, "folder to write, for diffusers and for tiue_jax", **add)
    flags.DEFINE_string("base", None, "where the tokenizer and the configurations come from; by the file's kind", **add)
    flags.DEFINE_enum("prediction_type", None, list(PREDICTION_TYPES), "of SD 2.x, whose files do not say it", **add)
    flags.DEFINE_enum("dtype", "float32", list(export.DTYPES), "of the weights on disk", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_import(args: flags.FlagValues) -> int:
    """Writes the pipeline folder of a community checkpoint of Stable Diffusion 1.x or 2.x in one file."""
    require(args, "file", "out")
    how = {name: getattr(args, name) for name in ("base", "prediction_type", "dtype", "overwrite")}
    kind = import_single_file(args.file, args.out, **how)
    print(f"{args.out}: {args.file}, like {kind}, in {args.dtype}")
    return 0


def define_merge_lora(f: flags.FlagValues) -> None:
    add: dict[str, Any] = {"flag_values": f}
    flags.DEFINE_string("model", None, "a pipeline: an alias, a folder, from the hub", **add)
    flags.DEFINE_string("lora", None, "LoRA weights: a .safetensors file, or a folder that diffusers wrote", **add)
    flags.DEFINE_string("out", None, "folder to write, for diffusers and for tiue_jax", **add)
    flags.DEFINE_float("scale", 1.0, "1 is the LoRA as it was trained", **add)
    flags.DEFINE_enum("dtype", "float32", list(export.DTYPES), "of the weights on disk", **add)
    flags.DEFINE_bool("overwrite", False, "replace an older pipeline in OUT", **add)


def run_merge_lora(args: flags.FlagValues) -> int:
    """Writes a pipeline with a LoRA merged into its UNet and its text encoder."""
    require(args, "model", "lora", "out")
    how = {name: getattr(args, name) for name in ("scale", "dtype", "overwrite")}
    count = merge_lora(args.model, args.lora, args.out, **how)
    print(f"{args.out}: {args.model} with {args.lora} at scale {args.scale:g} in {count} weights, in {args.dtype}")
    return 0


def _verifier() -> Callable[..., Any]:
    """The function that compares with PyTorch. ValueError where that is not installed."""
    try:
        from tiue_jax.convert.verify import verify
    except ModuleNotFoundError as error:
        raise ValueError(f"--verify needs PyTorch ({error}): pip install 'tiue-jax[torch]'") from error
    return verify


COMMANDS = {
    "export": Command("a run's student, or a pipeline, to a folder for diffusers", define_export, run_export),
    "export-compiled": Command("a pipeline to a program without code", define_export_compiled, run_export_compiled),
    "import": Command("a checkpoint in one file to a pipeline folder", define_import, run_import),
    "merge-lora": Command("a LoRA into a pipeline, to a new folder", define_merge_lora, run_merge_lora),
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; prints one line on stderr about what was wrong."""
    overview = "\n".join(f"    {name}: {command.help}" for name, command in COMMANDS.items())
    try:
        name = subcommand(argv, list(COMMANDS), f"{__doc__}\nCommands:\n{overview}")
        if name is None:
            return 0
        command = COMMANDS[name]
        args = parse([f"{argv[0]} {name}", *argv[2:]], command.define, str(command.run.__doc__))
        return 0 if args is None else command.run(args)
    except (ValueError, OSError, flags.Error) as error:
        print_error(error)
        return BAD_INPUT
