"""`python -m tiue_jax.data.prepare`, which is `tiue data prepare`."""

import sys

from tiue_jax.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main(["python -m tiue_jax.data.prepare", *sys.argv[1:]]))
