"""Small tables of vectors with labels, in which variation between species hides the genera."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import SinkBlock, VectorTable


def clustered(
    families: int = 6, genera: int = 4, species: int = 5, rows: int = 4, width: int = 24, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Returns vectors and lineages; species differ most along the first third of the dimensions, genera along the rest."""
    rng = np.random.default_rng(seed)
    along = np.where(np.arange(width) < width // 3, 6.0, 0.3)
    vectors, lineages = [], []
    for f in range(families):
        family = rng.normal(size=width)
        for g in range(genera):
            genus = family + rng.normal(size=width)
            for s in range(species):
                centre = genus + along * rng.normal(size=width)
                for _ in range(rows):
                    vectors.append(centre + 0.1 * rng.normal(size=width))
                    lineages.append(
                        f"Animalia;Arthropoda;Insecta;Order{'ab'[f % 2]};Fam{'abcdefgh'[f]};Gen{f}x{g};Gen{f}x{g} sp{'abcdefgh'[s]}us"
                    )
    order = rng.permutation(len(vectors))
    return np.array(vectors, np.float32)[order] + 3, [lineages[i] for i in order]


def write_labelled(
    uri: Path | str,
    vectors: np.ndarray,
    lineages: Sequence[str | None] | None,
    *,
    finish: bool = True,
    columns: bool = False,
    plan: dict | None = None,
) -> str:
    """Writes vectors as embed writes them; `columns` stores the ranks one by one instead of `taxonomy`."""
    fields = [("dna_sequence", pa.string())]
    if lineages is not None:
        fields += [(rank, pa.string()) for rank in RANKS] if columns else [("taxonomy", pa.string())]
    schema = vector_schema(pa.schema(fields), vectors.shape[1], "float32")
    facts = {
        "data": {"sequence_column": "dna_sequence", "max_tokens": 512, "overlong": "truncate"},
        "model": {"weights_sha256": "w" * 64},
        "embed": {"pooling": "mean", "layer": 0, "strand": "forward", "phases": 6},
    }
    rows = len(vectors)
    table = VectorTable.open(
        str(uri),
        "sequences",
        schema=schema,
        plan=Plan(facts | (plan or {})),
        provenance={"weights_sha256": "w" * 64, "model": "tiny"},
        rows=rows if finish else 2 * rows,
        block_rows=rows,
        max_bytes_per_file=3 << 30,
    )
    data = {
        "sequence_id": pa.array([f"s{i}" for i in range(rows)]),
        "source_row": pa.array(np.arange(rows), pa.uint64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1]),
        "dna_sequence": pa.array(["ACGT"] * rows),
    }
    if lineages is not None and columns:
        names = [[None] * 7 if one is None else one.split(";") for one in lineages]
        data |= {rank: pa.array([row[i] for row in names], pa.string()) for i, rank in enumerate(RANKS)}
    elif lineages is not None:
        data["taxonomy"] = pa.array(lineages, pa.string())
    with table:
        table.append([SinkBlock(0, pa.table(data), REJECTS.empty_table())])
        if finish:
            table.finish("none")
    return str(uri)
