"""`python train.py`, which is `tiue train`."""

import sys

from tiue_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
