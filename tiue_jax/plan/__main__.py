"""`python -m tiue_jax.plan`, which is `tiue plan`."""

import sys

from tiue_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(["python -m tiue_jax.plan", *sys.argv[1:]]))
