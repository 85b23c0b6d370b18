"""`python -m tiue_jax.convert`, which is `tiue convert`."""

import sys

from tiue_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(["python -m tiue_jax.convert", *sys.argv[1:]]))
