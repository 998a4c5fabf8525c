"""Names barcodes by a table of vectors; one row each, with what it is worth."""

from typing import Literal

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    output: str,
    rerank: Literal["none", "alignment"] = "none",
    k: int = 50,
    aligned: int = 32,
    filter: str | None = None,
    search: config.SearchKind = "auto",
    nprobes: int | None = None,
    refine_factor: int | None = None,
    heads: str | None = None,
    processes: int = 2,
    format: Literal["parquet", "tsv", "sintax"] | None = None,
    calibration: str | None = None,
    groups: str | None = None,
    group_size: int = 3,
    check_recall: int = 0,
    seed: int = 0,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Name barcodes by a table of vectors; one row each, with what it is worth.

    Args:
        reference: Which table.
        query: Which barcodes.
        output: FILE.parquet, FILE.tsv or FILE.sintax.
        rerank: alignment orders the k candidates by identity.
        k: Nearest neighbours of a query.
        aligned: Of the candidates, so many are aligned in full and vote.
        filter: SQL condition on the reference's columns, such as "marker_gene = 'COI'".
        search: auto takes the table's vector index, where it has one, from 50,000 rows on.
        nprobes: Partitions of the index to search.
        refine_factor: Times k candidates taken from the index and compared by their exact vectors.
        heads: Directory of an export with taxonomic heads, to vote too.
        processes: Processes that align.
        format: Of the output, where its name does not say.
        calibration: File made by scripts/calibrate.py; the one beside the table if absent.
        groups: FILE.parquet or FILE.tsv for groups of novel barcodes.
        group_size: Barcodes of a group at least.
        check_recall: Of so many queries, say how often the best alignment is among the k, and what the index finds.
        seed: Of that sample.
        model: Where the table's model is now, if not where the table says.
        mesh: Which devices.
    """
    from bioscan_jax.matching.identify import identify

    settings = config.IdentifyConfig(
        k=k,
        rerank=rerank,
        aligned=aligned,
        filter=filter,
        search=search,
        nprobes=nprobes,
        refine_factor=refine_factor,
        heads=heads,
        processes=processes,
    )
    summary = identify(
        reference,
        query,
        output,
        settings,
        format=format,
        model=model,
        mesh=mesh,
        calibration=calibration,
        groups=groups,
        group_size=group_size,
        check_recall=check_recall,
        seed=seed,
    )
    print(summary)


command = from_flags(main, "identify")
