"""`python -m companion.experiments`: make what is missing or stale."""

import argparse
import time

from companion.experiments import EXPERIMENTS, run, stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help="these, stale or not: " + ", ".join(EXPERIMENTS),
    )
    chosen = parser.parse_args().names
    made = False
    for name in chosen or EXPERIMENTS:
        # One by one: a new result makes those that build on it stale.
        if chosen or name in stale():
            print(f"{name} ...", end=" ", flush=True)
            start = time.monotonic()
            run(name)
            print(f"{time.monotonic() - start:.0f} s", flush=True)
            made = True
    if not made:
        print("Every result is of today's code.")


if __name__ == "__main__":
    main()
