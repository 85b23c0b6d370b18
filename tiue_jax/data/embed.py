"""`python -m tiue_jax.data.embed`, which is `tiue data embed`."""

import sys

from tiue_jax.cli.embed import main

if __name__ == "__main__":
    sys.exit(main(["python -m tiue_jax.data.embed", *sys.argv[1:]]))
