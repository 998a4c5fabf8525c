"""Carries a vector table: python scripts/bundle.py export|verify|import --source FROM --target TO [--help].

export writes checked files to a directory, stick, URL or rclone:REMOTE:PATH; verify names those that are damaged or
missing; import merges them into a table. Each has its own --help: python scripts/bundle.py export --help
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable

from command import run


def verify(source: str | None = None, target: str | None = None) -> None:
    """Name every file of a bundle that is damaged, missing or extra; exit code 2 if there is one.

    Args:
        source: The bundle: directory, fsspec URL or rclone:REMOTE:PATH.
        target: The same, as export was given it.
    """
    from bioscan_jax.bundles.manifest import verify as find_faults
    from bioscan_jax.errors import InputError

    if (source is None) == (target is None):
        raise InputError("pass the bundle's place as --source or as --target")
    place, flag = (source, "source") if source is not None else (target or "", "target")
    files, wrong = find_faults(place, flag)
    print(
        "\n".join([*wrong, f"{files - len([w for w in wrong if ': extra' not in w]):,} of {files:,} files are whole"])
    )
    if wrong:
        raise InputError(
            f"{place}: {len(wrong):,} files are damaged, missing or extra; copy them again or export again"
        )


def printed(function: Callable[..., object]) -> Callable[..., None]:
    """The function, with what it returns printed."""

    @functools.wraps(function)
    def shown(**flags: object) -> None:
        print(function(**flags))

    return shown


def main() -> None:
    """Do what the first argument says; `--with PATH`, repeated, names what export takes along."""
    modes = ("export", "verify", "import")
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        if given in ("-h", "--help"):
            print((__doc__ or "").strip())
            return
        print(f"error: no mode {given!r}; pass one of {', '.join(modes)} first", file=sys.stderr)
        sys.exit(2)
    mode = sys.argv.pop(1)
    sys.argv[0] += f" {mode}"  # as --help shall call it
    if mode == "export":
        from bioscan_jax.bundles.bundle import export

        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--with", action="append", dest="beside", default=[], metavar="PATH")
        known, sys.argv[1:] = parser.parse_known_args()
        sys.argv += [f"--beside={json.dumps(known.beside)}"] if known.beside else []
        run(printed(export))
    elif mode == "import":
        from bioscan_jax.bundles.merge import import_bundle

        run(printed(import_bundle))
    else:
        run(verify)


if __name__ == "__main__":
    main()
