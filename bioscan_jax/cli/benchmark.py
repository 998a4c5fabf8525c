"""`bioscan benchmark NAME [--json FILE] [--picture FILE] [flags of NAME]`: measures us beside other programs."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from bioscan_jax.cli._command import UsageError, from_flags

SCRIPTS = Path(__file__).parents[2] / "scripts"
"""Of the checkout; the benchmarks need PyTorch, PEFT or VSEARCH and are not in the wheel."""


def command(words: Sequence[str]) -> None:
    """Runs the benchmark that the first word names, prints its figures, and keeps them as JSON and picture if asked."""
    if not (SCRIPTS / "benchmarks").is_dir():
        raise UsageError("the benchmarks are not in the installed package; run this in a checkout of the repository")
    sys.path.insert(0, str(SCRIPTS))
    from benchmarks import BENCHMARKS
    from benchmarks.figures import describe, write_json, write_picture

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE")
    wanted, flags = parser.parse_known_args(words)
    if not wanted.name and {"-h", "--help"} & {*flags}:
        lines = [f"  {name:10} {(one.__doc__ or '').splitlines()[0]}" for name, one in BENCHMARKS.items()]
        print("\n".join([(__doc__ or "").strip(), *lines, "bioscan benchmark NAME --help explains its flags."]))
        return
    if wanted.name not in BENCHMARKS:
        raise UsageError(f"no benchmark {wanted.name!r}; pass one of {', '.join(BENCHMARKS)} first")
    benchmark = BENCHMARKS[wanted.name]

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
    from_flags(measure, f"benchmark {wanted.name}")(flags)
