"""Reads the ranks and alphas that the metadata of a LoRA file give its layers, by the rules of peft."""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tiue_jax.checked_fields import Range, check
from tiue_jax.files import parse_json, read_json
from tiue_jax.models.lora import METADATA_KEY
from tiue_jax.weights import lora_source
from tiue_jax.weights.tensor_files import read_metadata

LORA_PARTS = ("unet", "text_encoder")  # the parts of a pipeline that a LoRA changes
TEXT_ROOT = "text_model."  # transformers 5 omits it

_PEFT_ROOT = "base_model.model."  # begins the names in the file of a single model that peft saves
_ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # peft's field of the alpha, by peft_type
_DEFAULT = 8  # of rank and alpha in peft
_LARGEST = 1e30  # alpha; larger ones are no numbers of a training
_Rank = Annotated[int, Range(1, 2**31 - 1)]
_FIELDS: dict[str, Any] = {  # of peft's configurations, which a factor depends on, beside the alpha
    "r": _Rank | None,
    "rank_pattern": dict[str, _Rank] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
}
# fields of peft's LoraConfig for adapters that are more than a change of the weight that their matrices give
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_CHANGE_THE_MODEL = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")  # values of init_lora_weights

# A key of rank_pattern or alpha_pattern is a regular expression. Some take longer than anybody waits, so only those are
# read that are checked in a known time: a name, with `.` or `\.` for the dots, classes, and two repetitions at most,
# none of a group. Everything that peft and diffusers write is a name, with or without ^ and $.
_CHARACTER = r"(?:[\w.-]|\\[.dw-]|\[\^?[\w.-]+\])"
_NAME = re.compile(rf"\^?{_CHARACTER}*\$?")
_REPEATS = re.compile(r"(?<!\\)[*+?]")
_MOST_REPEATS = 2
_MOST_REPEATED = 32  # patterns with repetitions, in one field
_LONGEST = 300  # characters


class Layer(NamedTuple):
    """A layer that a LoRA may change.

    Attributes:
        part: one of LORA_PARTS.
        module: the dotted name of the layer in its part.
    """

    part: str
    module: str

    def __str__(self) -> str:
        return f"{self.part}.{self.module}"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The fields of peft's configuration that the factor of a layer depends on, as the metadata of a file give them.

    Attributes:
        source: names the metadata in errors, such as "metadata field unet".
        r: rank of the layers that no key of `rank_pattern` matches. None if the metadata do not say it.
        alpha: alpha of the layers that no key of `alpha_pattern` matches. None, without metadata: their rank.
        rank_pattern: ranks by patterns of layer names.
        alpha_pattern: alphas by patterns of layer names.
        use_rslora: the factor is alpha / sqrt(rank).
        use_dora: every LoRA has a magnitude.
    """

    source: str
    r: Any = None
    alpha: Any = None
    rank_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def factor(self, layer: Layer, rank: int | None, alpha: Any = None) -> float:
        """The factor of a layer's change, alpha / rank.

        Args:
            layer: the layer.
            rank: of the layer's matrices. None if they have none, as those of a LoKr without products: then the rank of
                the metadata counts, and without metadata the factor is 1, as in LyCORIS.
            alpha: from the file. It comes before the alpha of the metadata. None if the file has none.

        Raises:
            ValueError: the metadata give another rank than the matrices, or alpha is no number.
        """
        told = next((x for key, x in self.rank_pattern.items() if matches(key, layer)), self.r)
        if told is not None and (rank is None or told != rank):
            if rank is not None:
                said = f"gives {layer.module} rank {str(told)[:50]}"
                raise ValueError(f"{self.source} {said}, its matrices have rank {rank}")
            rank = told
        if rank is None:
            if self.alpha is None:
                return 1.0
            rank = _DEFAULT
        if alpha is None:
            alpha = next((x for key, x in self.alpha_pattern.items() if matches(key, layer)), self.alpha)
        if alpha is None:
            alpha = rank
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -_LARGEST <= alpha <= _LARGEST:
            raise ValueError(f"{self.source}: alpha of {layer} must be a finite number, got {str(alpha)[:100]!r}")
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapters(path: Path, names: Collection[str], layers: Sequence[Layer]) -> dict[str, Adapter]:
    """The metadata of each part in LORA_PARTS: from the field that diffusers writes, or peft's adapter_config.json.

    Args:
        path: the file.
        names: of its tensors.
        layers: that they belong to.

    Raises:
        FileNotFoundError: tensors have the names that peft saves, and there is no adapter_config.json beside the file.
        ValueError: the metadata are of another kind of adapter, are not in peft's form, or have a pattern that is
            refused (see `check_pattern`) or matches none of `layers`, the layers in the file.
    """
    written = read_metadata(path).get(METADATA_KEY)
    config = path.with_name(lora_source.PEFT_CONFIG)
    source, fields = f"{path}: metadata field", {}
    if written is not None:
        fields = parse_json(written, f"{path}: metadata field {METADATA_KEY}")
    elif any(name.startswith(_PEFT_ROOT) for name in names):
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such file, expected the alpha of {path} there, as peft saves it")
        source, fields = f"{config}: field", read_json(config)
    adapters = {}
    for part in LORA_PARTS:
        of_part = [layer for layer in layers if layer.part == part]
        adapters[part] = _read_adapter(f"{source} {part}", _fields_of(part, fields) if of_part else {})
        for field in ("rank_pattern", "alpha_pattern"):
            _check_patterns(f"{adapters[part].source}.{field}", getattr(adapters[part], field), of_part)
    return adapters


def _fields_of(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one part. Their names begin with the part, or, in the file of a single model, with no part."""
    if not any("." in name for name in fields):
        return dict(fields)
    return {name.removeprefix(f"{part}."): x for name, x in fields.items() if name.startswith(f"{part}.")}


def _read_adapter(source: str, fields: Mapping[str, Any]) -> Adapter:
    """Reads the fields of peft's configuration. ValueError, beginning with `source`, for another kind of adapter."""
    kind = fields.get("peft_type") or "LORA"
    if kind not in _ALPHAS:
        expected = ", ".join(_ALPHAS)
        raise ValueError(f"{source}.peft_type is {str(kind)[:50]!r}, not supported, expected one of {expected}")
    for variant in _REFUSED:
        if fields.get(variant):
            value = "true" if fields[variant] is True else str(fields[variant])[:50]
            raise ValueError(f"{source}.{variant} is {value}: this variant of LoRA is not supported")
    start = str(fields.get("init_lora_weights"))
    if start.lower().startswith(_CHANGE_THE_MODEL):
        raise ValueError(
            f"{source}.init_lora_weights is {start[:50]!r}: this LoRA belongs to a changed model; "
            "save it with path_initial_model_for_weight_conversion of peft, which makes a plain LoRA of it"
        )
    alpha_field = _ALPHAS[kind]
    values = {
        name: check(f"{source}.{name}", annotation, fields.get(name))
        for name, annotation in (_FIELDS | {alpha_field: float | None}).items()
    }
    return Adapter(
        source,
        r=values["r"],
        alpha=values[alpha_field] if alpha_field in fields else (_DEFAULT if fields else None),
        rank_pattern=values["rank_pattern"] or {},
        alpha_pattern=values["alpha_pattern"] or {},
        use_rslora=bool(values["use_rslora"]),
        use_dora=bool(values["use_dora"]),
    )


# ---- patterns -------------------------------------------------------------------------------------------------------


def matches(pattern: str, layer: Layer) -> bool:
    """True if a key of peft's `rank_pattern` or `alpha_pattern` stands for a layer. The rule is peft's."""
    expression = _compiled(pattern)
    return any(expression.match(name) for name in (layer.module, layer.module.removeprefix(TEXT_ROOT)))


@functools.lru_cache(maxsize=10_000)  # a file may have a pattern for each layer
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _check_patterns(source: str, patterns: Collection[str], layers: Sequence[Layer]) -> None:
    """Raises ValueError if a pattern is refused, or matches none of `layers`."""
    repeated = 0
    for pattern in patterns:
        repeated += check_pattern(source, pattern) > 0
        if repeated > _MOST_REPEATED:
            raise ValueError(f"{source}: more than {_MOST_REPEATED} patterns with *, + or ?, expected names of layers")
        if not any(matches(pattern, layer) for layer in layers):
            raise ValueError(f"{source}: {pattern[:200]!r} matches no layer of the file")


def check_pattern(source: str, pattern: str) -> int:
    r"""Counts the repetitions in a pattern of layer names, which must be one that is matched in a short time.

    A pattern is a name of a layer, or the end of one. It may begin with ^ and end with $, and may contain `\.`, `\d`,
    `\w`, classes such as [0-3], and up to two of `*`, `+` and `?` behind a single character.

    Raises:
        ValueError: it is another regular expression. The error begins with `source`.
    """
    repeats = len(_REPEATS.findall(pattern))
    plain = _NAME.fullmatch(_REPEATS.sub("", pattern))
    # a repetition that follows nothing, or another one, is left to the parser
    if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or not plain:
        raise ValueError(
            f"{source}: {pattern[:100]!r} is refused, since some regular expressions run for ever: expected the "
            rf"name of a layer with ^, $, ., \., \d, \w, [classes] and up to {_MOST_REPEATS} of *, +, ?; "
            "write (a|b) as two patterns"
        )
    try:
        _compiled(pattern)
    except re.error as error:
        raise ValueError(f"{source}: {pattern[:200]!r} is no pattern: {error}") from error
    return repeats
