"""`bioscan bundle export|verify|import --source FROM --target TO`: carries a vector table.

export writes checked files to a directory, stick, URL or rclone:REMOTE:PATH; verify names those that are damaged or
missing; import merges them into a table. Each has its own help: bioscan bundle export --help
"""

from collections.abc import Sequence

from bioscan_jax.cli._command import UsageError, from_flags, printed, repeated


def verify(source: str | None = None, target: str | None = None) -> None:
    """Name every file of a bundle that is damaged, missing or extra; exit code 2 if there is one.

    Args:
        source: The bundle: directory, fsspec URL or rclone:REMOTE:PATH.
        target: The same, as export was given it.
    """
    from bioscan_jax.bundles.manifest import verify_bundle
    from bioscan_jax.errors import InputError

    if (source is None) == (target is None):
        raise InputError("pass the bundle's place as --source or as --target")
    place, flag = (source, "source") if source is not None else (target or "", "target")
    found = verify_bundle(place, flag=flag)
    print(found)
    if count := len(found.faults):
        raise InputError(f"{place}: {count:,} files are damaged, missing or extra; copy them again or export again")


def command(words: Sequence[str]) -> None:
    """Runs `bioscan bundle`; `--with PATH`, which may be repeated, names what export takes along."""
    mode, *flags = words or [""]
    if mode in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif mode == "export":
        from bioscan_jax.bundles.bundle import bundle

        from_flags(printed(bundle), "bundle export")(repeated(flags, **{"with": "beside"}))
    elif mode == "import":
        from bioscan_jax.bundles.merge import import_bundle

        from_flags(printed(import_bundle), "bundle import")(flags)
    elif mode == "verify":
        from_flags(verify, "bundle verify")(flags)
    else:
        raise UsageError(f"no mode {mode!r}; pass one of export, verify, import first")
