"""Fits, on labelled barcodes, what answers of scripts/identify.py are worth; keeps it beside the table."""

from typing import Literal

from bioscan_jax import config
from bioscan_jax.cli._command import from_flags


def main(
    reference: config.ReferenceConfig,
    query: config.QueryConfig,
    rerank: Literal["none", "alignment"] = "none",
    k: int = 50,
    aligned: int = 32,
    filter: str | None = None,
    search: config.SearchKind = "auto",
    nprobes: int | None = None,
    refine_factor: int | None = None,
    heads: str | None = None,
    processes: int = 2,
    precision: float = 0.95,
    risk: float = 0.05,
    held_out: float = 0.5,
    seed: int = 0,
    model: config.ModelConfig | None = None,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
) -> None:
    """Fit, on labelled barcodes, what answers of scripts/identify.py with the same settings are worth.

    Args:
        reference: Which table.
        query: Labelled barcodes like those to be identified.
        rerank: As in scripts/identify.py, and so up to processes.
        k: Nearest neighbours of a query.
        aligned: Of the candidates, so many are aligned in full and vote.
        filter: SQL condition on the reference's columns.
        search: How neighbours are found.
        nprobes: Partitions of the index to search.
        refine_factor: Times k candidates taken from the index and compared by their exact vectors.
        heads: Directory of an export with taxonomic heads, to vote too.
        processes: Processes that align.
        precision: Share of the answers of each rank that must be right.
        risk: Probability that a threshold does not keep it.
        held_out: Share of the labelled barcodes that nothing is fitted on; the figures are theirs.
        seed: Of the parting.
        model: Where the table's model is now, if not where the table says.
        mesh: Which devices.
    """
    from bioscan_jax.matching.calibration import calibrate

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
    wanted = config.CalibrateConfig(precision=precision, risk=risk, held_out=held_out, seed=seed)
    print(calibrate(reference, query, settings, wanted, model=model, mesh=mesh))


command = from_flags(main, "calibrate")
