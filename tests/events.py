"""Reads TensorBoard event files back."""

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def events(workdir: Path) -> list[Event]:
    """All records of a run's event files: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    """Step, tag and value of every scalar."""
    values = [(e.step, v) for e in events(workdir) for v in e.summary.value]
    return [(step, v.tag, v.simple_value) for step, v in values if v.HasField("simple_value")]
