"""The same 20 captions in every format in which prompts are read."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

# With all that CSV and JSON quote: commas, quotes, tabs in none of them, letters beyond ASCII and beyond 16 bits.
CAPTIONS = [f'a "{colour}" apple, {place} café 🍎' for colour in ("red", "green", "blue", "old") for place in "ABCDE"]
ROWS = [{"id": i, "caption": caption, "url": f"http://x/{i}.jpg"} for i, caption in enumerate(CAPTIONS)]
COCO = {
    "info": {"year": 2014},
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
    "annotations": [{"image_id": i, "caption": caption} for i, caption in enumerate(CAPTIONS)],
}
KARPATHY = {
    "images": [{"split": "train", "sentences": [{"raw": c} for c in CAPTIONS[i : i + 5]]} for i in range(0, 20, 5)]
}


def table(delimiter=",", header=True, **options) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, **options)
    if header:
        writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return text.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out, row_group_size=7)
    return out.getvalue()


def arrow(new) -> bytes:
    out = io.BytesIO()
    made = pa.Table.from_pylist(ROWS)
    with new(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=7)
    return out.getvalue()


def shard(members: dict[str, bytes], mode="w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def samples(*suffixes: str) -> dict[str, bytes]:
    """The files that img2dataset writes: for every sample an image, its caption and its description."""
    made = {}
    for i, row in enumerate(ROWS):
        content = {"jpg": b"\xff\xd8\xff" * 99, "txt": CAPTIONS[i].encode(), "json": json.dumps(row).encode()}
        made |= {f"00000/{i:09d}.{suffix}": content[suffix] for suffix in suffixes}
    return made


LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
TEXT = "\r\n".join(CAPTIONS).encode()
FORMATS = {
    "p.txt": TEXT,
    "bom.txt": b"\xef\xbb\xbf" + TEXT,
    "p.csv": table(),
    "bom.csv": b"\xef\xbb\xbf" + table(),
    "quoted.csv": table(quoting=csv.QUOTE_ALL),
    "semicolon.csv": table(";"),
    "p.tsv": table("\t"),
    "tabs.csv": table("\t"),
    "one_column.csv": b"caption\n" + "".join('"' + c.replace('"', '""') + '"\n' for c in CAPTIONS).encode(),
    "p.jsonl": LINES,
    "texts.jsonl": "".join(f"{json.dumps(caption)}\n" for caption in CAPTIONS).encode(),
    "array.json": json.dumps(ROWS).encode(),
    "texts.json": json.dumps(CAPTIONS, indent=1).encode(),
    "pretty.json": json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "pretty_lines.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "captions_val2014.json": json.dumps(COCO).encode(),
    "columns.json": json.dumps({"caption": CAPTIONS}, indent=1).encode(),
    "p.parquet": parquet(),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "img2dataset.tar": shard(samples("jpg", "txt", "json")),
    "texts.tar": shard(samples("txt")),
    "described.tar": shard(samples("jpg", "json")),
}


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
