"""Fetches four emoji sets and writes the training images: {out}/images.npy, {out}/index.json and {out}/sheet.png.

    python examples/emoji/data.py --out runs/emoji [--cache FOLDER_WITH_THE_NPM_ARCHIVES]

The styles (styles.py) are Google's Noto Emoji, Twitter's Twemoji, and Microsoft's Fluent Emoji flat and 3D, from npm
packages of fixed versions (packages.py); about 153 MB are downloaded once. A concept is an emoji that Noto and Twemoji
both draw, and has one prompt: its Unicode name in lower case. Flags and skin tones are left out. The Fluent sets lack
some concepts, such as families.

    images.npy   uint8 [n 64 64 3]   on white
    index.json   concepts  [{code, prompt, aliases, mirrors}]   the prompt is unique; mirrors: whether the mirror image
                                                                shows the same concept
                 images    [[concept, style]]   numbers of the concept and the style of each image
                 styles    [name]
"""

import argparse
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from packages import GOOGLE, fetch, read_member
from styles import SIZE, STYLES, code_of, is_held_out

from tiue_jax import images
from tiue_jax.files import write_json

REQUIRED = ("google", "twitter")  # the sets that must have an emoji, as the list of Google's package calls them
SHEET_CONCEPTS = 48


def clean(name: str) -> str:
    """Returns a name in lower case with words separated by one space: "UP-POINTING ARROW" -> "up pointing arrow"."""
    return re.sub(r"[^a-z0-9&#*+]+", " ", name.lower().replace("’", "").replace("'", "")).strip()


def drop_reason(entry: dict[str, Any]) -> str | None:
    """Returns why an emoji of the list is left out, or None if it stays."""
    if entry["category"] in ("Flags", "Component"):
        return f"category {entry['category']}"
    if not all(entry[f"has_img_{name}"] for name in REQUIRED):
        return "not in both Noto and Twemoji"
    return None


def name_concepts(entries: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns a unique prompt for each emoji, and its aliases: short names that no other emoji has."""
    names = [clean(e["name"] or e["short_name"]) for e in entries]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    prompts = [clean(e["short_name"]) if n in repeated else n for e, n in zip(entries, names, strict=True)]
    if len(set(prompts)) != len(prompts):
        raise ValueError(f"prompts must be unique, got twice {[p for p, c in Counter(prompts).items() if c > 1]}")

    # Short names that end in a digit ("dog2") only number the emoji of one word.
    shorts = [[clean(s) for s in e["short_names"] if not s[-1].isdigit()] for e in entries]
    used = Counter(prompts) + Counter(s for row in shorts for s in set(row))
    aliases = [
        [s for s in dict.fromkeys(row) if len(s) > 1 and s != prompt and used[s] == 1]
        for row, prompt in zip(shorts, prompts, strict=True)
    ]
    return prompts, aliases


def mirrors(entry: dict[str, Any]) -> bool:
    """Returns whether the mirror image of an emoji has the same name. Letters, arrows and clock faces do not."""
    sided = re.search(r"left|right|clock|east|west|text|writing", f"{entry['name']} {entry['subcategory']}".lower())
    return entry["category"] != "Symbols" and sided is None


def sheet(pixels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns a grid of some concepts, uint8 [H W 3]: each in all styles side by side, white where one is missing."""
    number = {(int(c), int(s)): i for i, (c, s) in enumerate(pairs)}
    concepts = np.linspace(0, pairs[:, 0].max(), SHEET_CONCEPTS).astype(int)
    white = np.full(pixels.shape[1:], 255, np.uint8)
    cells = [(int(c), s) for c in concepts for s in range(len(STYLES))]
    shown = [pixels[number[cell]] if cell in number else white for cell in cells]
    return images.grid(np.stack(shown), 4 * len(STYLES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--cache", type=Path, default=os.environ.get("EMOJI_CACHE"), help="default: {out}/npm")
    args = parser.parse_args()
    cache = Path(args.cache) if args.cache else args.out / "npm"

    with tarfile.open(fetch(GOOGLE, cache)) as tar:
        listed = json.loads(read_member(tar, tar.getmember("package/emoji.json")))
    reasons = [drop_reason(e) for e in listed]
    kept = [e for e, reason in zip(listed, reasons, strict=True) if reason is None]
    for reason, count in Counter(filter(None, reasons)).most_common():
        print(f"dropped {count:5d}  {reason}")
    tones = sum(len(e.get("skin_variations", {})) for e in kept)
    print(f"dropped {tones:5d}  skin tone variants of kept emoji")

    codes = [code_of(e["unified"]) for e in kept]
    drawn = [style.read(fetch(style.package, cache), set(codes)) for style in STYLES]
    cells = [(c, s) for c, code in enumerate(codes) for s in range(len(STYLES)) if code in drawn[s]]
    pairs = np.array(cells)
    pixels = np.stack([drawn[s][codes[c]] for c, s in cells])

    prompts, aliases = name_concepts(kept)
    concepts: list[dict[str, Any]] = [
        {"code": code, "prompt": prompt, "aliases": others, "mirrors": mirrors(e)}
        for code, prompt, others, e in zip(codes, prompts, aliases, kept, strict=True)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / "images.npy", pixels)
    names = [style.name for style in STYLES]
    write_json(args.out / "index.json", {"styles": names, "concepts": concepts, "images": pairs.tolist()})
    images.write_png(args.out / "sheet.png", sheet(pixels, pairs))

    held = [(codes[c], names[s]) for c, s in cells if is_held_out(codes[c], names[s])]
    for number, name in enumerate(names):
        print(f"style   {int((pairs[:, 1] == number).sum()):5d}  {name}, {sum(s == name for _, s in held)} held out")
    print(f"{sum(c['mirrors'] for c in concepts)} of the concepts may be mirrored")
    print(f"kept    {len(kept):5d}  concepts, {len(pixels)} images of {SIZE}x{SIZE} in {args.out}")
    print(f"held    {len(held):5d}  images out of training")


if __name__ == "__main__":
    main()
