"""`bioscan data get NAME --output DIR`: published reference sequences with lineages, as Parquet.

The names are greengenes_16s (pip fetches it) and ncbi_18s (apt-get fetches it, on Debian and Ubuntu; the lineages need
pip install 'bioscan_jax[data]').
"""

from collections.abc import Sequence

from bioscan_jax.cli._command import UsageError, from_flags, positional


def get(name: str, output: str, downloads: str = "~/.cache/bioscan_jax/downloads") -> None:
    """Write published reference sequences with their lineages to OUTPUT/NAME.parquet; a file that is there is kept.

    Args:
        name: greengenes_16s or ncbi_18s; it may stand first, without its flag.
        output: Directory of the Parquet file.
        downloads: Directory of the packages that they come from; one that is there is not fetched again.
    """
    from bioscan_jax.data.published import get_published

    print(get_published(name, output, downloads))


def command(words: Sequence[str]) -> None:
    """Runs `bioscan data`."""
    mode, *flags = words or [""]
    if mode in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif mode == "get":
        from_flags(get, "data get")(positional(flags, "name"))
    else:
        raise UsageError(f"no mode {mode!r}; pass get first")
