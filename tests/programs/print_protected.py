"""Prints a line and the beginning of another one, as a command does. The test gives it an output that fails."""

from tiue_jax.cli import output

if __name__ == "__main__":
    with output.protected():
        print("a line")
        print("x", end="")
