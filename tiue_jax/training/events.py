"""Reads back the scalars of a run's `tensorboard/`, and files of curves."""

import csv
import io
import logging
import os

from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tiue_jax import files

logger = logging.getLogger(__name__)

Curves = dict[str, dict[int, float]]  # by tag, such as "train/loss_vsd": the value by step

_HEADER, _FOOTER = 12, 4  # bytes around a record: its length and checksums


def read_run(workdir: str | os.PathLike[str]) -> Curves:
    """All scalars of a run. What a resumed run logged again replaces what was logged before.

    A record that is not whole, as while the run writes it, ends its file.

    Raises:
        FileNotFoundError: the folder has no events.
    """
    folder = files.at(workdir) / "tensorboard"
    paths = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{workdir}: no events in its folder tensorboard, expected the folder of a run")
    curves: Curves = {}
    for path in paths:
        for event in _events(path):
            if event.session_log.status == SessionLog.START:  # a run went on from an older checkpoint
                for values in curves.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: values for tag, values in curves.items() if values}


def _events(path: epath.Path) -> list[Event]:
    """The events of a file, up to the first that is not whole. A damaged one is logged."""
    found, at, data = [], 0, path.read_bytes()
    while at + _HEADER <= len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        end = at + _HEADER + length
        if end + _FOOTER > len(data):
            break
        try:
            found.append(Event.FromString(data[at + _HEADER : end]))
        except DecodeError:
            logger.warning("%s: damaged at byte %d, its scalars after that are left out", path, at)
            break
        at = end + _FOOTER
    return found


def write_csv(path: str | os.PathLike[str], curves: Curves) -> None:
    """Writes curves as a CSV file: a row for each step, a column for each tag, four digits."""
    tags = sorted(curves)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *tags])
    for step in sorted({step for values in curves.values() for step in values}):
        cells = (curves[tag].get(step) for tag in tags)
        writer.writerow([step, *("" if value is None else f"{value:.4g}" for value in cells)])
    with files.writing_aside(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def read_csv(path: str | os.PathLike[str]) -> Curves:
    """Reads a file of `write_csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; names the line.
    """
    rows = csv.reader(io.StringIO(files.at(path).read_text(encoding="utf-8")))
    head = next(rows, [])
    if head[:1] != ["step"]:
        raise ValueError(f"{path}: expected a CSV file whose first column is step, got {','.join(head)[:60]!r}")
    curves: Curves = {tag: {} for tag in head[1:]}
    for number, row in enumerate(rows, 2):
        try:
            step = int(row[0])
            for tag, cell in zip(head[1:], row[1:], strict=True):
                if cell:
                    curves[tag][step] = float(cell)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: expected {len(head)} numbers, got {','.join(row)[:60]!r}"
            ) from error
    return curves
