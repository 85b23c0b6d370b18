"""Runs `tiue sample` with these arguments and prints how many compiled programs came from jax's cache on disk."""

import sys

import jax

from tiue_jax.cli import sample


def main() -> int:
    hits = []

    def record(event: str, **_: object) -> None:
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(record)
    status = sample.main(["sample.py", *sys.argv[1:]])
    print(len(hits), "hits")
    return status


if __name__ == "__main__":
    sys.exit(main())
