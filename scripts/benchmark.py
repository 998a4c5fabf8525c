"""Measures one thing: python scripts/benchmark.py NAME [--json FILE] [that benchmark's flags; --help lists them]."""

import argparse
import functools
import sys

from command import run


def main() -> None:
    """Run the benchmark that the first argument names, print what it found and keep it as JSON if asked to."""
    from bioscan_jax.benchmark import BENCHMARKS, describe, write_json

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--json", metavar="FILE")
    wanted, flags = parser.parse_known_args()
    if wanted.name not in BENCHMARKS:
        print(f"error: no benchmark {wanted.name!r}; pass one of {', '.join(BENCHMARKS)} first", file=sys.stderr)
        sys.exit(2)
    benchmark, sys.argv[1:] = BENCHMARKS[wanted.name], flags

    @functools.wraps(benchmark)
    def measure(**flags: object) -> None:
        figures = benchmark(**flags)
        print(describe(figures))
        if wanted.json is not None:
            write_json(figures, wanted.json)

    run(measure)


if __name__ == "__main__":
    main()
