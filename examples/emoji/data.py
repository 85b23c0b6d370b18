"""Fetches two emoji sets and writes the training pictures: {out}/data.npz and {out}/prompts.txt.

    python examples/emoji/data.py --out runs/emoji [--cache FOLDER_WITH_THE_NPM_ARCHIVES]

The sets are Google's Noto Emoji and Twitter's Twemoji, 64 px PNGs from the npm packages `emoji-datasource-google` and
`emoji-datasource-twitter`. Each concept has two drawings and one prompt: its Unicode name in lower case. Flags, skin
tones and pictures that only one set has are left out. data.npz holds

    images   uint8 [concepts 2 32 32 3]   drawing 0 is Google's, drawing 1 is Twitter's
    prompts  str [concepts]               unique, such as "red apple"
    aliases  str [concepts]               further names of the concept, separated by "|", such as "pizza"
    mirrors  bool [concepts]              whether the mirror image shows the same concept: no letters, no "left"
"""

import argparse
import io
import json
import os
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = "16.0.0"
SETS = ("google", "twitter")
SIZE = 32  # pixels


def fetch(cache: Path) -> list[Path]:
    """The archives of the two npm packages in `cache`, downloaded by `npm pack` where they are not there yet."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = [cache / f"emoji-datasource-{s}-{VERSION}.tgz" for s in SETS]
    if missing := [s for s, a in zip(SETS, archives, strict=True) if not a.exists()]:
        packages = [f"emoji-datasource-{s}@{VERSION}" for s in missing]
        subprocess.run(["npm", "pack", "--silent", *packages], cwd=cache, check=True)
    return archives


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a file in an archive."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} in the archive must be a file, got a folder or a link")
    return file.read()


def read_pictures(archive: Path, wanted: set[str], folder: str) -> dict[str, np.ndarray]:
    """The wanted PNGs of an archive by file name: composited on white, uint8 [SIZE SIZE 3]."""
    pictures = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if str(path.parent).endswith(folder) and path.name in wanted:
                picture = Image.open(io.BytesIO(read_member(tar, member))).convert("RGBA")
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture)
                pictures[path.name] = np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return pictures


def clean(name: str) -> str:
    """Lower case, words separated by one space: "UP-POINTING RED TRIANGLE" -> "up pointing red triangle"."""
    return re.sub(r"[^a-z0-9&#*+]+", " ", name.lower().replace("’", "").replace("'", "")).strip()


def drop_reason(entry: dict) -> str | None:
    """Why an emoji of the list is left out; None where it stays."""
    if entry["category"] in ("Flags", "Component"):
        return f"category {entry['category']}"
    if not all(entry[f"has_img_{s}"] for s in SETS):
        return "in one set only"
    return None


def name_concepts(entries: list[dict]) -> tuple[list[str], list[str]]:
    """A unique prompt for each emoji and its aliases: short names that no other emoji is called by."""
    names = [clean(e["name"] or e["short_name"]) for e in entries]
    repeated = {n for n, count in Counter(names).items() if count > 1}
    prompts = [clean(e["short_name"]) if n in repeated else n for e, n in zip(entries, names, strict=True)]
    if len(set(prompts)) != len(prompts):
        raise ValueError(f"prompts must be unique, got twice {[p for p, c in Counter(prompts).items() if c > 1]}")

    # short names that end in a digit ("dog2") only number the emoji of one word
    shorts = [[clean(s) for s in e["short_names"] if not s[-1].isdigit()] for e in entries]
    used = Counter(prompts) + Counter(s for row in shorts for s in set(row))
    aliases = [
        "|".join(s for s in dict.fromkeys(row) if len(s) > 1 and s != p and used[s] == 1)
        for row, p in zip(shorts, prompts, strict=True)
    ]
    return prompts, aliases


def mirrors(entry: dict) -> bool:
    """Whether the mirror image of an emoji goes by the same name. Letters, arrows and clock faces do not."""
    sided = re.search(r"left|right|clock|east|west|text|writing", f"{entry['name']} {entry['subcategory']}".lower())
    return entry["category"] != "Symbols" and sided is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--cache", type=Path, default=os.environ.get("EMOJI_CACHE"), help="default: {out}/npm")
    args = parser.parse_args()

    archives = fetch(Path(args.cache) if args.cache else args.out / "npm")
    with tarfile.open(archives[0]) as tar:
        listed = json.loads(read_member(tar, tar.getmember("package/emoji.json")))
    reasons = [drop_reason(e) for e in listed]
    kept = [e for e, reason in zip(listed, reasons, strict=True) if reason is None]
    for reason, count in Counter(filter(None, reasons)).most_common():
        print(f"dropped {count:5d}  {reason}")
    tones = sum(len(e.get("skin_variations", {})) for e in kept)
    print(f"dropped {tones:5d}  skin tone variants of kept emoji")

    wanted = {e["image"] for e in kept}
    sets = [read_pictures(a, wanted, f"img/{s}/64") for a, s in zip(archives, SETS, strict=True)]
    if absent := [name for name in sorted(wanted) for pictures in sets if name not in pictures]:
        raise FileNotFoundError(f"pictures must be in both archives, missing {absent}")
    prompts, aliases = name_concepts(kept)

    args.out.mkdir(parents=True, exist_ok=True)
    images = np.stack([[pictures[e["image"]] for pictures in sets] for e in kept])
    mirrored = [mirrors(e) for e in kept]
    np.savez_compressed(args.out / "data.npz", images=images, prompts=prompts, aliases=aliases, mirrors=mirrored)
    (args.out / "prompts.txt").write_text("".join(f"{p}\n" for p in prompts), encoding="utf-8")
    print(f"{sum(mirrored)} of the concepts may be mirrored")
    print(f"kept    {len(kept):5d}  concepts, {2 * len(kept)} pictures of {SIZE}x{SIZE} in {args.out / 'data.npz'}")


if __name__ == "__main__":
    main()
