"""`tiue convert inspect`: its flags, and its report as tables or as JSON."""

import json
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiue_jax.cli.command_line import require
from tiue_jax.convert.inspect_model import Report, inspect
from tiue_jax.convert.tensor_facts import Facts


def define_inspect(values: flags.FlagValues) -> None:
    """Defines the flags of `tiue convert inspect`."""
    add: dict[str, Any] = {"flag_values": values}
    model = "a file, a folder, a shipped model or alias, or a hub repository; the name of the flag may be left out"
    flags.DEFINE_string("model", None, f"{model} (required)", **add)
    flags.DEFINE_bool("json", False, "print the report as JSON", **add)
    values_help = "look for values that are not finite, which reads all weights (default: of what is on this disk)"
    flags.DEFINE_bool("values", None, values_help, **add)


def run_inspect(args: flags.FlagValues) -> int:
    """Says what a file, a folder or a hub repository is, and which commands read it.

    tiue convert inspect FILE|FOLDER|HUB_ID [--json] [--novalues]
    """
    require(args, "model")
    report = inspect(args.model, read_values=args.values)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report)
    return 0


def print_report(report: Report) -> None:
    """Prints a report on stdout. Commands are printed whole, however narrow the terminal is."""
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    for name, value in _rows(report):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    if report.parts:
        console.print(_parts_table(report.parts))
    console.print(Text("read by" if report.commands else "read by no command", style="bold"))
    for command in report.commands:
        console.print(Text(f"  {command}"), soft_wrap=True)


def _rows(report: Report) -> list[tuple[str, str]]:
    """The rows of the first table."""
    rows = [("source", report.source), ("kind", report.kind)]
    if report.base_model:
        rows.append(("base model", report.base_model))
    if report.prediction_type or report.prediction_evidence:
        rows.append(("prediction", f"{report.prediction_type or 'unknown'}: {report.prediction_evidence}"))
    if report.adapter is not None:
        found = report.adapter
        rows += [("layers", _counts(found.layers)), ("ranks", _counts(found.ranks))]
        rows += [("alphas", _counts(found.alphas) or "none in the tensors"), ("targets", _counts(found.targets))]
    rows += list(report.metadata.items())
    rows += [("tensor", f"{name} {about}") for name, about in report.largest.items()]
    rows += [("note", note) for note in report.notes]
    return rows


def _parts_table(parts: Mapping[str, Facts]) -> Table:
    """One row for each part."""
    table = Table()
    for column in ("part", "what", "parameters", "dtypes", "sizes", "not finite"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name, part in parts.items():
        broken = "not checked"
        if part.checked:
            found = part.not_finite
            broken = f"{found.values} in {found.tensors} tensors, such as {found.example}" if found else "none"
        sizes = ", ".join(f"{size.replace('_', ' ')} {value}" for size, value in part.sizes.items())
        row = (name, part.what or "", f"{part.parameters:,}", _counts(part.dtypes), sizes, broken)
        table.add_row(*map(Text, row))
    return table


def _counts(counted: Mapping[Any, int]) -> str:
    """The values with their numbers: `4 (32), 8 (2)`; one value alone."""
    if len(counted) == 1:
        return str(next(iter(counted))) or "unknown"
    return ", ".join(f"{value or 'unknown'} ({number:,})" for value, number in counted.items())
