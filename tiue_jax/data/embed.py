"""Makes the text embeddings of all prompts once, so that training needs no text encoder in its step.

    python -m tiue_jax.data.embed --model emoji --prompts tiue_jax/assets/emoji/prompts.txt --out runs/embeddings

Then train with --config.data.embeddings=runs/embeddings and the same model and prompts. Stopped in the middle, the same
command goes on. Embeddings are computed in float32 and kept in bfloat16: 158 kB a prompt for Stable Diffusion 2.1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from tiue_jax import components, hub, sharding
from tiue_jax.data import corpus, embeddings
from tiue_jax.tokenizer import Tokenizer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tiue_jax.data.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="the teacher: shipped model, folder or hub repository")
    parser.add_argument("--prompts", required=True, help="a file of prompts, or a folder that data.prepare made")
    parser.add_argument("--field", help="path to the prompt in JSON lines, with dots")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new, or begun before; here or gs://")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts at a time, on all local devices (64)")
    return parser.parse_args(argv)


def load_encode(folder: Path, batch_size: int) -> embeddings.Encode:
    """Prompts [b] to text embeddings float32 [b l d], split over the local devices."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch_size, mesh)
    encoder = components.load_text_encoder(folder)
    tokenize = Tokenizer(folder / "tokenizer", encoder.cfg.max_position_embeddings)
    params = jax.device_put(encoder.params, sharding.replicated(mesh))
    encode = jax.jit(lambda params, ids: encoder.bind(params)(ids).last_hidden_state)
    return lambda prompts: encode(params, jax.device_put(tokenize(prompts), sharding.batch_sharding(mesh)))


def run(args: argparse.Namespace) -> str:
    folder = hub.resolve(args.model)
    prompts = corpus.open_prompts(args.prompts, args.field)
    encode = load_encode(folder, args.batch_size)
    key = embeddings.make_key(prompts, folder / "tokenizer", folder / "text_encoder")
    made = embeddings.write(args.out, prompts, encode, key, args.batch_size)
    return f"{args.out}: text embeddings {list(made.null.shape)} of {len(prompts):,} prompts"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        print(run(args))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
