"""Says what a file, a folder or a hub repository is, and which commands of this product read it.

Reads safetensors and JSON only. A pickle is named and never opened.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiue_jax.convert import compiled_sampler
from tiue_jax.convert.inspect_commands import Source, commands
from tiue_jax.convert.tensor_facts import AdapterFacts, Facts, adapter_facts, facts, largest
from tiue_jax.data import embeddings
from tiue_jax.files import expand, read_json
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import PREDICTION_TYPES
from tiue_jax.weights import diagnosis, hub, hub_headers, layout, leftovers, lora_source, original_names
from tiue_jax.weights.pipeline_folder import check_pipeline, load_sampling, read_configs
from tiue_jax.weights.prediction import read_evidence
from tiue_jax.weights.tensor_files import StoredTensor, open_file, open_folder, read_metadata
from tiue_jax.weights.vae_choice import SD_SCALING_FACTOR

_SAFETENSORS = ".safetensors"
# the parts of a checkpoint in one file, by how the names of their tensors begin
_PREFIXES = {
    "unet": (original_names.UNET, "unet."),
    "vae": (original_names.VAE, "vae."),
    "text_encoder": (original_names.CLIP, original_names.OPEN_CLIP, "text_encoder."),
    "unet_ema": (original_names.EMA,),
}
_CONFIG = "config.json"
_RUN_FIELDS = {"model", "data", "train"}  # of the config.json of a training run
# fields of the metadata that trainers write, and that tell something about the file
_METADATA = (
    "modelspec.title",
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "name",
)
_LONGEST_VALUE = 80  # characters of a field of the metadata


@dataclasses.dataclass(frozen=True)
class Report:
    """The report on a file, a folder or a repository.

    Attributes:
        source: its name.
        kind: such as "a LoRA for Stable Diffusion 1.x".
        base_model: such as "Stable Diffusion XL". None if nothing shows it.
        prediction_type: what the UNet predicts: "epsilon", "v_prediction", or another word of the scheduler's
            configuration. None if nothing says it, or it has no UNet.
        prediction_evidence: what says so, or why nothing does.
        parts: what the tensors tell, by the name of the part; "" for a file or a folder that has none.
        adapter: the ranks, alphas and layers of a LoRA or its kin.
        metadata: what trainers have written into the file.
        notes: facts in a sentence each, such as the reason for which nothing reads it.
        commands: what this product can do with it, ready to run.
        largest: the largest tensors of a file of unknown content.
    """

    source: str
    kind: str
    base_model: str | None = None
    prediction_type: str | None = None
    prediction_evidence: str | None = None
    parts: dict[str, Facts] = dataclasses.field(default_factory=dict)
    adapter: AdapterFacts | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    largest: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return dataclasses.asdict(self)


def inspect(name: str | Path, read_values: bool | None = None) -> Report:
    """Says what a file, a folder or a model's name is.

    Args:
        name: a file, a folder, a shipped model or alias, a hub repository (owner/name), or a file in one.
        read_values: look for values that are not finite, which reads all weights, and downloads those of the hub. None
            does so for what is on this disk.

    Raises:
        FileNotFoundError: there is no such file, folder or model.
        ValueError: it is a pickle, damaged, or nothing that is known here; the error says what it is and what to do.
    """
    text, path = str(name), expand(name)
    if path.is_file():
        return _inspect_file(text, path, read_values is not False)
    if text and path.is_dir():
        return _inspect_folder(text, path, read_values is not False)
    is_a_file = text.lower().endswith((_SAFETENSORS, *diagnosis.OTHER_FORMATS))
    if is_a_file and (text.count("/") < 2 or text.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{path}: no such file")
    if is_a_file and not text.lower().endswith(_SAFETENSORS):
        raise ValueError(diagnosis.other_format(path))
    is_remote = is_a_file or hub.is_repository_name(text) or hub.known(text) is not None
    if is_remote and not read_values and not hub.on_disk(text):
        # if the hub cannot be reached, there may be an earlier download, or a copy in $TIUE_MODELS
        with contextlib.suppress(OSError), hub_headers.headers(text) as found:
            look = _inspect_file if found.is_file() else _inspect_folder
            return look(text, found, False)
    if is_a_file:
        return _inspect_file(text, lora_source.resolve(text), read_values is not False)
    return _inspect_folder(text, _resolve(text), read_values is not False)


def _resolve(name: str) -> Path:
    """The folder of a model or of an adapter, after a download if necessary. Errors as `inspect`."""
    try:
        return hub.resolve(name)
    except (FileNotFoundError, ValueError) as error:
        if not hub.is_repository_name(name):
            raise
        try:
            return lora_source.resolve(name).parent  # a repository without a config.json holds an adapter
        except (OSError, ValueError) as second:
            raise FileNotFoundError(diagnosis.shortened(f"{error}; {second}")) from second


# ---- files ----------------------------------------------------------------------------------------------------------


def _inspect_file(source: str, path: Path, read_values: bool) -> Report:
    """Describes a safetensors file. Errors as `inspect`."""
    if path.suffix.lower() != _SAFETENSORS:
        raise ValueError(diagnosis.other_format(path))
    return _inspect_tensors(source, path, open_file(path), read_values)


def _inspect_tensors(source: str, path: Path, tensors: Mapping[str, StoredTensor], read_values: bool) -> Report:
    """Describes the tensors of a file."""
    kind = diagnosis.recognise(tensors)
    metadata = read_metadata(path)
    about = {field: str(metadata[field])[:_LONGEST_VALUE] for field in _METADATA if field in metadata}
    report = Report(source, "unknown: no tensor of it is known here" if kind is None else str(kind), metadata=about)
    if kind is None:
        notes = (f"not read: no command knows its {len(tensors)} tensors, of which the largest are listed",)
        parts = {"": facts(tensors, read_values)}
        return dataclasses.replace(report, parts=parts, largest=largest(tensors), notes=notes)
    if kind.role == diagnosis.ADAPTER:
        return _adapter(report, kind, tensors, read_values)
    parts = _parts_of(tensors, read_values)
    report = dataclasses.replace(report, base_model=kind.base, parts=parts)
    if kind.role in (diagnosis.CHECKPOINT, diagnosis.UNET):
        # names and the small files beside it say enough without the values of this table
        table = {} if read_values else {"alphas_cumprod"}
        seen = {name: tensor for name, tensor in tensors.items() if name not in table}
        report = _with_prediction(report, path, seen, kind)
    if kind.role == diagnosis.EMBEDDING:
        width = next(iter(parts.values())).sizes.get("width", 0)
        base = "Stable Diffusion XL" if "clip_g" in tensors else diagnosis.base_of_width(width)
        report = dataclasses.replace(report, base_model=base)
    choose = PREDICTION_TYPES if kind.base == diagnosis.SD2 and report.prediction_type is None else ()
    is_nameless = "emb_params" in tensors and "name" not in metadata
    found = Source(
        source,
        kind.role,
        report.base_model,
        frozenset(parts),
        prediction_types=tuple(choose) if kind.role in (diagnosis.CHECKPOINT, diagnosis.UNET) else (),
        token=path.stem if is_nameless else None,
    )
    return _with_commands(report, found)


def _parts_of(tensors: Mapping[str, StoredTensor], read_values: bool) -> dict[str, Facts]:
    """The facts of each part of a checkpoint in one file, and of the tensors that are in none."""
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part, prefixes in _PREFIXES.items() if name.startswith(prefixes)), "")
        groups.setdefault(part, {})[name] = tensor
    if len(groups) > 1 and "" in groups:
        rest = groups.pop("")
        kept = {name: tensor for name, tensor in rest.items() if leftovers.reason(name) is None}
        groups |= {name: some for name, some in (("other", kept), ("left over", {**rest} if not kept else {})) if some}
    return {part: facts(group, read_values) for part, group in groups.items()}


def _with_prediction(report: Report, path: Path, tensors: Mapping[str, StoredTensor], kind: diagnosis.Kind) -> Report:
    """Adds what the UNet of a file predicts, and the evidence."""
    try:
        evidence = read_evidence(path, tensors)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return dataclasses.replace(report, prediction_evidence=reason, notes=(*report.notes, f"not read: {reason}"))
    if evidence is not None:
        return dataclasses.replace(
            report, prediction_type=evidence.prediction_type, prediction_evidence=evidence.source
        )
    if kind.base == diagnosis.SD2:
        why = "nothing in the file says it: pass --prediction_type epsilon (512 px) or v_prediction (768 px)"
        return dataclasses.replace(report, prediction_evidence=why)
    if diagnosis.is_foreign(kind):
        return report
    why = "nothing in the file says otherwise, and Stable Diffusion 1.x predicts the noise"
    return dataclasses.replace(report, prediction_type="epsilon", prediction_evidence=why)


def _adapter(report: Report, kind: diagnosis.Kind, tensors: Mapping[str, StoredTensor], read_values: bool) -> Report:
    """Describes a LoRA or its kin."""
    adapter, notes = adapter_facts(tensors, read_values), list(report.notes)
    if adapter.is_lcm:
        report = dataclasses.replace(report, kind=f"{report.kind}, maybe an LCM-LoRA")
        notes.append(
            "its layers are those of an LCM-LoRA (convolutions, projections and time_emb_proj of the UNet, no text "
            "encoder); a LoCon has the same"
        )
    report = dataclasses.replace(
        report,
        base_model=kind.base,
        parts={"": facts(tensors, read_values)},
        adapter=adapter,
        notes=tuple(notes),
    )
    return _with_commands(report, Source(report.source, kind.role, kind.base, frozenset(), is_lcm=adapter.is_lcm))


def _with_commands(report: Report, source: Source) -> Report:
    """Adds the commands that read it, or the reason for which none does."""
    found, note = commands(source)
    if not found and not note:
        note = "no command of this product reads it"
    refused = any(text.startswith("not read") for text in report.notes)
    return dataclasses.replace(
        report, commands=() if refused else tuple(found), notes=(*report.notes, *([note] if note else []))
    )


# ---- folders --------------------------------------------------------------------------------------------------------


def _inspect_folder(source: str, folder: Path, read_values: bool) -> Report:
    """Describes a folder. Errors as `inspect`."""
    if (folder / layout.MODEL_INDEX).is_file():
        return _inspect_pipeline(source, folder, read_values)
    if (folder / compiled_sampler.MANIFEST).is_file():
        return _inspect_compiled(source, folder, read_values)
    if (folder / embeddings.MANIFEST).is_file():
        manifest = read_json(folder / embeddings.MANIFEST)
        shape = " ".join(map(str, manifest.get("shape") or []))
        report = Report(source, "text embeddings of prompts, made by tiue data embed", notes=(f"shape [{shape}]",))
        return _with_commands(report, Source(source, "embeddings"))
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if config.keys() >= _RUN_FIELDS:
        return _inspect_run(source, folder, config)
    if config.get("_class_name") or config.get("architectures"):
        return _inspect_model(source, folder, config, read_values)
    if any((folder / part / _CONFIG).is_file() for part in layout.MODEL_PARTS):
        parts, notes = _folder_parts(folder, read_values)
        report = Report(source, f"parts of a pipeline: {', '.join(parts)}", parts=parts, notes=notes)
        base = next((diagnosis.base_of_width(f.sizes.get("text_width", 0)) for f in parts.values()), None)
        return _with_commands(
            dataclasses.replace(report, base_model=base), Source(source, "parts", base, frozenset(parts))
        )
    return _inspect_files(source, folder, read_values)


def _inspect_files(source: str, folder: Path, read_values: bool) -> Report:
    """Describes a folder that holds only files of weights."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix.lower() == _SAFETENSORS]
    if not weights:
        if other := next((path for path in files if path.suffix.lower() in diagnosis.OTHER_FORMATS), None):
            raise ValueError(diagnosis.other_format(other))
        names = ", ".join(path.name for path in sorted(folder.iterdir())[: diagnosis.EXAMPLES]) or "nothing"
        expected = "a pipeline, a model, a LoRA, a run, a compiled sampler or text embeddings"
        raise ValueError(diagnosis.shortened(f"{folder}: expected {expected}, the folder holds {names}"))
    if len(weights) == 1 or any(path.name in _ADAPTERS for path in weights):
        path = next((path for path in weights if path.name in _ADAPTERS), weights[0])
        return _inspect_tensors(source, path, open_file(path), read_values)
    kinds = [f"{path.name}: {diagnosis.kind_of(open_file(path)) or 'unknown'}" for path in weights]
    return Report(source, f"a folder with {len(weights)} files of weights", notes=(*kinds, "inspect one of the files"))


_ADAPTERS = (lora_source.DIFFUSERS_FILE, lora_source.PEFT_FILE)


def _folder_parts(folder: Path, read_values: bool) -> tuple[dict[str, Facts], tuple[str, ...]]:
    """The facts of each model in the folders of a pipeline, and notes on the folders without weights."""
    parts, notes = {}, []
    for path in sorted(folder.iterdir()):
        if not (path.is_dir() and (path / _CONFIG).is_file()):
            continue
        try:
            where, tensors = open_folder(path)
        except (FileNotFoundError, ValueError) as error:
            notes.append(diagnosis.shortened(str(error)))
            continue
        parts[path.name] = facts(tensors, read_values)
        if where.suffix == ".json" or ".fp16" in where.name:
            shards = len({tensor.path for tensor in tensors.values()})
            notes.append(f"{path.name}: {shards} shards" if where.suffix == ".json" else f"{path.name}: {where.name}")
    return parts, tuple(notes)


def _inspect_pipeline(source: str, folder: Path, read_values: bool) -> Report:
    """Describes a pipeline folder."""
    parts, notes = _folder_parts(folder, read_values)
    written = read_json(folder / layout.MODEL_INDEX).get("_class_name")
    scheduler = folder / "scheduler" / layout.SCHEDULER_CONFIG
    said = read_json(scheduler).get("prediction_type") if scheduler.is_file() else None
    unet = parts.get("unet")
    base = None if unet is None else diagnosis.base_of_width(unet.sizes.get("text_width", 0))
    if "text_encoder_2" in parts or (folder / "text_encoder_2").is_dir():
        base = "Stable Diffusion XL" if unet is not None else None
    report = Report(source, f"a pipeline folder ({written})", base_model=base, parts=parts, notes=notes)
    if scheduler.is_file():
        evidence = f"scheduler/{layout.SCHEDULER_CONFIG}" + ("" if said else ": the default")
        report = dataclasses.replace(report, prediction_type=str(said or "epsilon"), prediction_evidence=evidence)
    sampling: Sampling | None = None
    try:
        check_pipeline(folder)
        sampling = load_sampling(folder, read_configs(folder).unet)
    except (OSError, ValueError) as error:
        reason = diagnosis.shortened(str(error))
        return dataclasses.replace(report, notes=(*notes, f"not read: {reason}"))
    is_student = sampling.sampler == "tiue"
    if is_student:
        kind = f"{report.kind}, a student with K = {sampling.num_inference_steps}"
        report = dataclasses.replace(report, kind=kind)
    missing = [part for part in layout.MODEL_PARTS if part not in parts]
    if missing:
        return dataclasses.replace(report, notes=(*notes, f"not read: no weights of {', '.join(missing)}"))
    return _with_commands(report, Source(source, "student" if is_student else "pipeline", base))


def _inspect_model(source: str, folder: Path, config: Mapping[str, Any], read_values: bool) -> Report:
    """Describes the folder of one model, with its config.json."""
    written = str(config.get("_class_name") or ", ".join(map(str, config.get("architectures") or [])))
    path, tensors = open_folder(folder)
    kind = diagnosis.recognise(tensors)
    held = facts(tensors, read_values)
    report = Report(source, f"{kind or 'a model'} ({written}), a folder with its config.json", parts={"": held})
    if path.suffix == ".json":
        report = dataclasses.replace(report, notes=(f"{len({t.path for t in tensors.values()})} shards",))
    if kind is None:
        return _with_commands(report, Source(source, diagnosis.OTHER))
    report = dataclasses.replace(report, base_model=kind.base)
    factor = config.get("scaling_factor", SD_SCALING_FACTOR)
    if kind.role == diagnosis.VAE and factor != SD_SCALING_FACTOR:
        why = f"not read: scaling_factor is {factor}, Stable Diffusion 1.x and 2.x have {SD_SCALING_FACTOR}"
        return dataclasses.replace(report, notes=(*report.notes, why))
    return _with_commands(report, Source(source, kind.role, kind.base, frozenset({kind.role}), is_folder=True))


def _inspect_run(source: str, folder: Path, config: Mapping[str, Any]) -> Report:
    """Describes the folder of a training run. Its checkpoints are not safetensors, so none is opened."""
    model = config["model"] if isinstance(config["model"], Mapping) else {}
    teacher = model.get("pretrained_model_name_or_path")
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    found = f"checkpoints of the steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
    report = Report(source, "a training run of tiue train", notes=(f"its teacher is {teacher}", found))
    return _with_commands(report, Source(source, "run" if steps else "run without a checkpoint"))


def _inspect_compiled(source: str, folder: Path, read_values: bool) -> Report:
    """Describes the folder of a compiled sampler."""
    manifest = read_json(folder / compiled_sampler.MANIFEST)
    sampling = manifest.get("sampling")
    shown = manifest | ({"sampler": sampling.get("sampler")} if isinstance(sampling, Mapping) else {})
    notes = [f"{name}: {shown[name]}" for name in ("format", "sampler", "platforms", "dtype") if name in shown]
    weights = folder / compiled_sampler.WEIGHTS
    parts = {"": facts(open_file(weights), read_values)} if weights.is_file() else {}
    report = Report(source, "a compiled sampler of tiue convert export-compiled", parts=parts, notes=tuple(notes))
    return _with_commands(report, Source(source, "compiled sampler"))
