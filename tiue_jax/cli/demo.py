"""Opens a web page that draws as you type, with the student beside its teacher.

    tiue demo
    tiue demo --model sd21-base --vae tiny
    tiue demo --model runs/emoji_tiue/student --teacher emoji --port 8000

The page needs Gradio: pip install "tiue-jax[demo]". It is for this machine only, unless --host says otherwise, and asks
no other server for anything. Ctrl-C ends it. docs/demo.md describes it.
"""

import argparse
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

from tiue_jax import compile_cache
from tiue_jax.checked_fields import Range, check
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, ArgumentParser, print_error
from tiue_jax.demo.studio import open_studio
from tiue_jax.weights.pipeline_folder import DTYPES


def main(argv: Sequence[str]) -> int:
    """Serves the page until Ctrl-C. Returns the exit status: 130 after Ctrl-C, or 2 after one line on stderr."""
    parser = ArgumentParser(argv, __doc__)
    parser.add_argument("--model", default="emoji-tiue", help="a name as for tiue sample (default: %(default)s)")
    teacher = "drawn beside a student, a name like --model; by default the teacher of a shipped student"
    parser.add_argument("--teacher", help=teacher)
    styles = "words for the style, which the page adds to the prompt; may be repeated"
    parser.add_argument("--style", action="append", default=[], help=styles)
    parser.add_argument("--vae", help="an autoencoder that replaces the model's: tiny (TAESD), a file, or a name")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(default: %(default)s)")
    host = "the address to listen at; 0.0.0.0 is open to the network (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument(
        "--max_images", type=int, default=8, help="images of one request, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--max_queue", type=int, default=64, help="requests that may wait; others get a message (default: %(default)s)"
    )
    parser.add_argument("--no_compile_cache", action="store_true", help="compile again, and keep nothing")
    try:
        args = parser.parse_args(argv[1:])
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def run(args: argparse.Namespace) -> None:
    """Reads the models, compiles, and serves the page until the process is interrupted.

    Raises:
        ValueError, OSError: an argument or a model is wrong, or the port is taken.
        FloatingPointError: the image that is drawn first has values that are NaN or infinite.
    """
    port = check("port", Annotated[int, Range(1, 65_535)] | None, args.port)
    max_images = check("max_images", Annotated[int, Range(1, 64)], args.max_images)
    max_queue = check("max_queue", Annotated[int, Range(1, 10_000)], args.max_queue)
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio, which is not installed: pip install 'tiue-jax[demo]'")
    if args.no_compile_cache:
        compile_cache.disable()
    else:
        compile_cache.enable()
    studio = open_studio(
        args.model,
        args.teacher,
        given_styles=args.style,
        max_images=max_images,
        dtype=args.dtype,
        vae=args.vae,
    )
    from tiue_jax.demo import page, server  # here, since Gradio takes seconds

    print("Compiling, once; the next start is faster", flush=True)
    page.warm_up(studio)
    with server.serving(studio, host=args.host, port=port, max_queue=max_queue) as address:
        print(f"{studio.model.name} draws at {address}   (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
