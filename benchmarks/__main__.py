"""`make bench`: run the benchmarks, print their table, write JSON beside it.

    python -m benchmarks [NAME ...] [--runs N]

Run nothing else meanwhile. Only ratios within one run mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.report import HEADER, Figure, write_json

NAMES = (
    "packaging",
    "loading",
    "blas",
    "health",
    "engine",
    "serving",
    "no_op",
    "guided",
    "soak",
    "scaling",
)


def main() -> int:
    """Run what was named, or all; the exit status is 1 when a floor was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="how long soak goes on")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    every: list[Figure] = []
    for name in arguments.names or NAMES:
        print(f"{name}: {arguments.runs} runs …", file=sys.stderr, flush=True)
        options = {"minutes": arguments.minutes} if name == "soak" and arguments.minutes else {}
        figures = importlib.import_module(f"benchmarks.{name}").run(arguments.runs, **options)
        write_json(name, figures)
        every += figures
    print(HEADER)
    for figure in every:
        print(figure.row())
    return 1 if any(figure.verdict == "MISSED" for figure in every) else 0


if __name__ == "__main__":
    sys.exit(main())
