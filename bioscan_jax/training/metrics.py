"""Accuracy per rank and the spread of the vectors, accumulated over batches."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Int64

from bioscan_jax.barcodes.lineage import RANKS


class RankCounts(NamedTuple):
    """Rows and correct predictions of each taxon, on the host: one array per rank."""

    known: tuple[Int64[np.ndarray, " _taxa"], ...]
    """Rows that belong to the taxon."""
    correct: tuple[Int64[np.ndarray, " _taxa"], ...]
    """Rows of the taxon that were predicted correctly."""


def no_counts(sizes: tuple[int, ...]) -> RankCounts:
    """Returns zero counts for `sizes` taxa at each rank."""
    known, correct = (tuple(np.zeros(size, np.int64) for size in sizes) for _ in range(2))
    return RankCounts(known, correct)


def add_predictions(
    counts: RankCounts, predicted: Int32[np.ndarray, "b 7"], labels: Int32[np.ndarray, "b 7"]
) -> RankCounts:
    """Adds a batch: rows with label -1 (unknown) are skipped, a prediction of -1 for a known label is wrong."""
    known, correct = [], []
    for rank, (before, right) in enumerate(zip(counts.known, counts.correct, strict=True)):
        label = labels[:, rank]
        hit = (label >= 0) & (predicted[:, rank] == label)
        known.append(before + np.bincount(label[label >= 0], minlength=len(before)))
        correct.append(right + np.bincount(label[hit], minlength=len(before)))
    return RankCounts(tuple(known), tuple(correct))


class EmbeddingMoments(NamedTuple):
    """Summary statistics of vectors: float32 arrays of one batch on the device, float64 after merging on the host."""

    rows: Array | np.float64
    elements: Array | np.float64
    norm: Array | np.float64
    """Mean Euclidean norm of a vector."""
    mean: Array | np.float64
    """Mean of all elements."""
    squares: Array | np.float64
    """Sum of the squared differences from `mean`."""


def embedding_moments(vectors: Float[Array, "b d"], used: Bool[Array, " b"]) -> EmbeddingMoments:
    """Returns the moments of the used rows of a batch; all 0 if no row is used."""
    vectors = vectors.astype(jnp.float32)
    rows = jnp.sum(used, dtype=jnp.float32)
    elements = rows * vectors.shape[1]
    norms = jnp.sqrt(jnp.sum(jnp.square(vectors), axis=1))
    mean = jnp.sum(jnp.where(used[:, None], vectors, 0.0)) / jnp.maximum(elements, 1.0)
    return EmbeddingMoments(
        rows,
        elements,
        jnp.sum(jnp.where(used, norms, 0.0)) / jnp.maximum(rows, 1.0),
        mean,
        jnp.sum(jnp.where(used[:, None], jnp.square(vectors - mean), 0.0)),
    )


def dashboard_metrics(counts: RankCounts | None = None, moments: EmbeddingMoments | None = None) -> dict[str, float]:
    """Returns the metrics by dashboard name, without those that were not measured.

    For each rank with known rows: `eval/<rank>_accuracy`; `eval/<rank>_macro_accuracy`, the mean over the taxa present;
    `eval/<rank>_majority`, the share of the commonest taxon, which is the accuracy of the best constant answer; and
    `eval/<rank>_known`, the number of rows. For the vectors: `metrics/embedding_norm` (mean Euclidean norm), and
    `metrics/embedding_mean` and `metrics/embedding_std` over all elements.
    """
    metrics: dict[str, float] = {}
    if counts is not None:
        for rank, known, correct in zip(RANKS, counts.known, counts.correct, strict=True):
            rows, seen = int(known.sum()), known > 0
            if rows:
                metrics[f"eval/{rank}_accuracy"] = float(correct.sum() / rows)
                metrics[f"eval/{rank}_macro_accuracy"] = float(np.mean(correct[seen] / known[seen]))
                metrics[f"eval/{rank}_majority"] = float(known.max() / rows)
                metrics[f"eval/{rank}_known"] = float(rows)
    if moments is not None and moments.rows > 0:
        metrics["metrics/embedding_norm"] = float(moments.norm)
        metrics["metrics/embedding_mean"] = float(moments.mean)
        metrics["metrics/embedding_std"] = float(np.sqrt(float(moments.squares) / float(moments.elements)))
    return metrics
