"""Makes a prompt corpus, which training reads at random without holding it in memory.

    python -m tiue_jax.data.prepare --prompts train_anno.jsonl --field Task2.Caption --out data/journeydb
    python -m tiue_jax.data.prepare --prompts coco_captions/2014/1.1.0 --field captions.text --out gs://bucket/coco

Prompts are unique, non-empty and NFC-normalised; what was dropped is printed, and stored in the folder's metadata.json.
Then train with --config.data.prompts=data/journeydb.
"""

import argparse
import sys
from collections.abc import Sequence

from tiue_jax.data import corpus
from tiue_jax.data.prompts import describe


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tiue_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = "text, a prompt a line; JSON lines; a folder that tensorflow-datasets prepared"
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help=kinds)
    parser.add_argument("--field", help="path to the prompt with dots, for the latter two: Task2.Caption")
    parser.add_argument("--split", default="train", help="of a tensorflow-datasets folder (default: train)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder, here or gs://")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        made = corpus.write(args.prompts, args.out, args.field, args.split)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(made):,} prompts{describe(made.dropped)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
