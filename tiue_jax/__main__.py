"""`python -m tiue_jax`, which is `tiue`."""

import sys

from tiue_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
