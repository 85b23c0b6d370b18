"""Runs `tiue sample` with these arguments, and prints how many programs it needed and how many jax's cache had."""

import collections
import sys

import jax

from tiue_jax.cli import sample


def main() -> int:
    events = collections.Counter[str]()

    def record(event: str, **_: object) -> None:
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(record)
    status = sample.main(["sample.py", *sys.argv[1:]])
    print(events["compile_requests_use_cache"], "programs", events["cache_hits"], "hits")
    return status


if __name__ == "__main__":
    sys.exit(main())
