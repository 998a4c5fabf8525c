"""`bioscan describe FILE`: tells how a file of barcodes is read and what in it would be rejected."""

from collections.abc import Sequence

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags, positional


def main(data: config.DataConfig) -> None:
    """Describe barcodes without a model: columns, lineages, lengths, duplicates, rejects; the file may stand first.

    Args:
        data: Which barcodes; --data.path may stand first, without its flag.
    """
    from bioscan_jax.planning.describe import describe

    print(describe(data))


def command(words: Sequence[str]) -> None:
    """Runs `bioscan describe`."""
    from_flags(main, "describe")(positional(words, "data.path"))
