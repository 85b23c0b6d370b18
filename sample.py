"""`python sample.py`, which is `tiue sample`."""

import sys

from tiue_jax.cli.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
