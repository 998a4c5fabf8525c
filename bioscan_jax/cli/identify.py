"""Identifies barcodes with a vector table of labelled ones: one row of names and confidences per barcode."""

from collections.abc import Sequence

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags, path_flags


def main(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    output: str,
    settings: config.IdentifyConfig,
    archive: config.ArchiveConfig,
    format: config.AnswerFormat | None = None,
    calibration: str | None = None,
    groups: str | None = None,
    group_size: int = 3,
    check_recall: int = 0,
    details: bool = False,
    seed: int = 0,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Identify barcodes with a vector table of labelled ones: one row of names and confidences per barcode.

    Args:
        reference: Which table.
        query: Which barcodes.
        output: FILE.parquet, FILE.tsv, FILE.sintax, or FILE.dwca.zip for a Darwin Core archive.
        settings: How barcodes are compared.
        archive: What the Darwin Core archive says beside the identifications.
        format: Format of the output, where its name does not tell.
        calibration: File made by bioscan calibrate; the one beside the table if absent.
        groups: FILE.parquet or FILE.tsv for groups of novel barcodes.
        group_size: Fewest barcodes in a group.
        check_recall: Number of queries for which to measure how often the best alignment is among the k candidates,
            and how many of the nearest references the index finds.
        details: Also write the DNA of each query as it was compared, its vector and its alignment with the nearest
            reference to FILE.parquet, for bioscan report; a few kB per query.
        seed: Seed for drawing these queries.
        model: Where the table's model is now, if not where the table records it.
        mesh: Which devices.
    """
    from bioscan_jax.matching.identify import identify

    summary = identify(
        reference,
        query,
        output,
        settings,
        archive=archive,
        format=format,
        model=model,
        mesh=mesh,
        calibration=calibration,
        groups=groups,
        group_size=group_size,
        check_recall=check_recall,
        details=details,
        seed=seed,
    )
    print(summary)


def command(words: Sequence[str]) -> None:
    """Runs `identify` with the words that follow its name on the command line."""
    from_flags(main, "identify", unprefixed=["settings", "archive"])(path_flags(words, "--taxon_ids"))
