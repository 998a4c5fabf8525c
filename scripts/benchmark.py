"""Measures one thing: python scripts/benchmark.py NAME [--json FILE] [--picture FILE] [its own flags; --help lists]."""

import argparse
import functools
import sys

from command import run


def main() -> None:
    """Run the benchmark that the first argument names, print what it found, keep it as JSON and picture if asked to."""
    from benchmarks import BENCHMARKS
    from benchmarks.figures import describe, write_json, write_picture

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE")
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
        if wanted.picture is not None:
            write_picture(figures, wanted.picture, f"{wanted.name}: {next(iter(figures.values()))}")

    first, _, rest = (benchmark.__doc__ or "").partition("\n")
    measure.__doc__ = f"{first} --json FILE keeps the figures, --picture FILE draws them.\n{rest}"
    run(measure)


if __name__ == "__main__":
    main()
