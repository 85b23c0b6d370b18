"""Makes a prompt corpus on disk. Training reads it in random order and does not hold it in memory.

    tiue data prepare --prompts train_anno.jsonl --field Task2.Caption --out data/journeydb
    tiue data prepare --prompts coco_captions/2014/1.1.0 --field captions.text --out gs://bucket/coco
    tiue data prepare --prompts "shards/*.tar" captions.csv.gz --out data/captions

Prompts are NFC-normalised. Repeated and empty ones are dropped; their numbers are printed and stored in the folder's
metadata.json. Bad rows, such as a number instead of a text, are counted there, too, and the first five are shown.
To train with the corpus, give --config.data.prompts=data/journeydb.
"""

import argparse
from collections.abc import Sequence

from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, ArgumentParser, path, print_error
from tiue_jax.cli.output import protected
from tiue_jax.data import corpus
from tiue_jax.data.prompt_files import MAX_BAD_SHARE
from tiue_jax.data.prompts import describe
from tiue_jax.weights import hub


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises SystemExit after --help, and ValueError for a wrong argument."""
    parser = ArgumentParser(argv, __doc__)
    kinds = (
        "files, folders or patterns in quotes: text with a prompt a line, CSV, TSV, JSON, JSON Lines, parquet, "
        "webdataset shards, each also as .gz or .zst; a folder of tensorflow-datasets; the name of a data set on the "
        "Hugging Face hub (owner/name), or of a shipped model"
    )
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help=kinds)
    add_reading_arguments(parser)
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="a new folder, on this disk or gs://")
    return parser.parse_args(argv[1:])


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how prompts are read."""
    field = "the prompt's field or column: Task2.Caption; by default a usual one, such as caption, text or prompt"
    parser.add_argument("--field", help=field)
    split = "of a data set of tensorflow-datasets or of the hub (default: %(default)s)"
    parser.add_argument("--split", default="train", help=split)
    share = "the share of bad rows that may be left out (default: %(default)s)"
    parser.add_argument("--max_bad_share", type=float, default=MAX_BAD_SHARE, help=share)


@protected()
def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C."""
    try:
        args = parse(argv)
        prompts = [hub.SHIPPED_PROMPTS.get(name, name) for name in args.prompts]
        made = corpus.write(prompts, args.out, args.field, args.split, args.max_bad_share)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_INPUT
    print(f"{args.out}: {len(made):,} prompts{describe(made.dropped)}")
    return 0
