"""Makes the text embeddings of all prompts once, so that a training step needs no text encoder.

    tiue data embed --model emoji --prompts emoji --out runs/embeddings

Then train with --config.data.embeddings=runs/embeddings and the same model and prompts. If this command is stopped, the
same command goes on. Embeddings are computed in float32 and stored in bfloat16: 158 kB a prompt for Stable Diffusion
2.1.
"""

import argparse
import sys
from collections.abc import Sequence

from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, print_error
from tiue_jax.data import corpus, embeddings
from tiue_jax.weights import hub


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. SystemExit after --help (0) and on a wrong argument (2)."""
    parser = argparse.ArgumentParser(
        prog=argv[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the teacher: shipped model, folder or hub repository")
    parser.add_argument("--prompts", required=True, help="file, folder made by `prepare`, or a shipped model's name")
    parser.add_argument("--field", help="path to the prompt in JSON lines, with dots")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new, or begun before; on this disk or gs://")
    help_text = "prompts at a time, on all local devices (default: %(default)s)"
    parser.add_argument("--batch_size", type=int, default=64, help=help_text)
    return parser.parse_args(argv[1:])


def run(args: argparse.Namespace) -> str:
    """Makes the embeddings; returns a line that says what was made. ValueError or OSError on wrong input."""
    folder = hub.resolve(args.model)
    prompts = corpus.open_prompts(args.prompts, args.field)
    encode = embeddings.load_encode(folder, args.batch_size)
    key = embeddings.make_key(prompts, folder / "tokenizer", folder / "text_encoder")
    made = embeddings.write(args.out, prompts, encode, key, args.batch_size)
    return f"{args.out}: text embeddings {list(made.null.shape)} of {len(prompts):,} prompts"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, 2 after one line on stderr about what was wrong, 130 after Ctrl-C."""
    args = parse(argv)
    try:
        print(run(args))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_INPUT
    return 0
