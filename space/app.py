"""The page of `tiue demo` for a Space of the Hugging Face hub, which is open to everybody.

MODEL and TEACHER may be set as variables of the Space: names as for `tiue demo`.
"""

import os
import sys

from tiue_jax.cli.main import main

arguments = ["--host", os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), "--port", "7860", "--max_images", "4"]
for variable, flag in (("MODEL", "--model"), ("TEACHER", "--teacher")):
    if os.environ.get(variable):
        arguments += [flag, os.environ[variable]]

if __name__ == "__main__":
    sys.exit(main(["tiue", "demo", *arguments]))
