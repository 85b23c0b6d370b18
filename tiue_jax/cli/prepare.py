"""Makes a prompt corpus on disk. Training reads it in random order and does not hold it in memory.

    tiue data prepare --prompts train_anno.jsonl --field Task2.Caption --out data/journeydb
    tiue data prepare --prompts coco_captions/2014/1.1.0 --field captions.text --out gs://bucket/coco

Prompts are NFC-normalised. Repeated and empty ones are dropped; their numbers are printed and stored in the folder's
metadata.json. To train with the corpus, give --config.data.prompts=data/journeydb.
"""

import argparse
from collections.abc import Sequence

from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, ArgumentParser, path, print_error
from tiue_jax.cli.output import protected
from tiue_jax.data import corpus
from tiue_jax.data.prompts import describe
from tiue_jax.weights import hub


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises SystemExit after --help (status 0) and for a wrong argument (2)."""
    parser = ArgumentParser(prog=argv[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "text with a prompt a line, JSON lines, a folder of tensorflow-datasets, or the name of a shipped model"
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help=kinds)
    parser.add_argument("--field", help="path to the prompt, with dots, except for text: Task2.Caption")
    parser.add_argument("--split", default="train", help="split of a tensorflow-datasets folder (default: %(default)s)")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="a new folder, on this disk or gs://")
    return parser.parse_args(argv[1:])


@protected()
def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C."""
    args = parse(argv)
    try:
        prompts = [hub.SHIPPED_PROMPTS.get(name, name) for name in args.prompts]
        made = corpus.write(prompts, args.out, args.field, args.split)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_INPUT
    print(f"{args.out}: {len(made):,} prompts{describe(made.dropped)}")
    return 0
