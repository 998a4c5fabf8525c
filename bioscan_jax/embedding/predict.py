"""Names vectors by the taxonomic heads that were trained with their model."""

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads
from bioscan_jax.model.heads import predict

_ROWS_PER_CALL = 4096


class HeadPredictor:
    """Applies taxonomic heads to any number of vectors."""

    def __init__(self, heads: Heads) -> None:
        self._names = heads.space.names
        self._apply = jax.jit(lambda vectors: predict(heads.head(vectors), heads.tree, heads.kind))

    def __call__(self, vectors: Float32[np.ndarray, "n d"]) -> pa.Table:
        """Returns the seven ranks of each vector and RANK_confidence of each; nulls for a vector that is not finite."""
        there = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        taxa = np.full((len(vectors), len(RANKS)), -1, np.int32)
        confidence = np.full((len(vectors), len(RANKS)), np.nan, np.float64)
        for first in range(0, len(there), _ROWS_PER_CALL):
            rows = there[first : first + _ROWS_PER_CALL]
            # Padded to a power of two: each number of rows compiles.
            padded = np.zeros((1 << (len(rows) - 1).bit_length(), vectors.shape[1]), np.float32)
            padded[: len(rows)] = vectors[rows]
            chosen, sure = self._apply(padded)
            taxa[rows], confidence[rows] = np.asarray(chosen)[: len(rows)], np.asarray(sure)[: len(rows)]
        columns: dict[str, pa.Array] = {}
        for rank, names in enumerate(self._names):
            column = pa.array(taxa[:, rank], mask=taxa[:, rank] < 0)
            columns[RANKS[rank]] = pa.array(names, pa.string()).take(column)
        for rank, name in enumerate(RANKS):
            columns[f"{name}_confidence"] = pa.array(confidence[:, rank], mask=np.isnan(confidence[:, rank]))
        return pa.table(columns)
