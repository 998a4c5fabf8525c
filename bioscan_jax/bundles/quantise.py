"""Quantises vectors to fewer bytes, and measures the recall of nearest neighbours that this costs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from bioscan_jax.errors import InputError
from bioscan_jax.table.index import sub_vectors

Precision = Literal["float32", "float16", "int8", "pq"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "pq")
"""From the most exact to the smallest."""
NEIGHBOURS = 10
_CENTROIDS = 256
_TRAINING_ROWS = 8192
_KMEANS_ITERATIONS = 10

Blocks = Callable[[], Iterator[Float32[np.ndarray, "rows hidden"]]]
"""Reads all vectors from the start, in the same order, in blocks of rows."""


@dataclass(frozen=True)
class Quantiser:
    """Encodes vectors as codes and decodes them.

    int8 maps each dimension linearly from its smallest to its largest value to 0..255; pq replaces each piece of
    `codebook.shape[2]` dimensions by the number of the nearest of 256 centroids (Jegou et al. 2011).
    """

    precision: Precision
    low: Float32[np.ndarray, " hidden"] | None = None
    step: Float32[np.ndarray, " hidden"] | None = None
    codebook: Float32[np.ndarray, "pieces centroids width"] | None = None

    def encode(self, vectors: Float32[np.ndarray, "rows hidden"]) -> Shaped[np.ndarray, "rows codes"]:
        """Returns the codes of vectors: float32, float16 or uint8.

        Raises:
            InputError: A value is too large for float16.
        """
        if self.precision == "float32":
            return vectors
        if self.precision == "float16":
            with np.errstate(over="ignore"):
                codes = vectors.astype(np.float16)
            if (np.isinf(codes) & np.isfinite(vectors)).any():
                raise InputError(
                    f"a vector has {np.abs(vectors).max():.6g}, too large for float16; pass another --precision"
                )
            return codes
        if self.low is not None and self.step is not None:
            scaled = (vectors - self.low) / np.where(self.step > 0, self.step, 1)
            return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        assert self.codebook is not None
        from scipy.cluster.vq import vq

        parts = np.split(vectors, len(self.codebook), axis=1)
        nearest = [vq(part, book, check_finite=False)[0] for part, book in zip(parts, self.codebook, strict=True)]
        return np.stack(nearest, axis=1).astype(np.uint8)

    def decode(self, codes: Shaped[np.ndarray, "rows codes"]) -> Float32[np.ndarray, "rows hidden"]:
        """Returns the vectors that codes stand for."""
        if self.low is not None and self.step is not None:
            return self.low + codes.astype(np.float32) * self.step
        if self.codebook is not None:
            picked = self.codebook[np.arange(len(self.codebook)), codes]
            return picked.reshape(len(codes), -1)
        return codes.astype(np.float32, copy=False)

    def save(self, file: Path) -> None:
        """Writes the arrays that int8 and pq need for decoding, as safetensors."""
        from safetensors.numpy import save_file

        arrays = {"low": self.low, "step": self.step, "codebook": self.codebook}
        save_file({name: array for name, array in arrays.items() if array is not None}, file)

    @staticmethod
    def load(precision: Precision, file: Path) -> "Quantiser":
        """Reads what `save` wrote."""
        from safetensors.numpy import load_file

        return Quantiser(precision, **load_file(file))


def bytes_per_vector(precision: Precision, hidden_size: int) -> int:
    """Returns the bytes of one vector's codes."""
    if precision == "pq":
        return sub_vectors(hidden_size)
    return hidden_size * {"float32": 4, "float16": 2, "int8": 1}[precision]


def fit(precisions: Sequence[Precision], blocks: Blocks, rows: int, seed: int) -> dict[Precision, Quantiser]:
    """Fits quantisers in one pass over all vectors.

    Args:
        precisions: The precisions to fit; pq is left out if there are fewer vectors than centroids, float16 if it
            overflows.
        blocks: Reads the vectors.
        rows: Number of vectors.
        seed: Random seed of the sample that pq is trained on and of its k-means.
    """
    rng = np.random.default_rng(seed)
    sampled = np.sort(rng.choice(rows, min(rows, _TRAINING_ROWS), replace=False))
    low = high = None
    training, start = [], 0
    for block in blocks():
        low = block.min(0) if low is None else np.minimum(low, block.min(0))
        high = block.max(0) if high is None else np.maximum(high, block.max(0))
        inside = sampled[(sampled >= start) & (sampled < start + len(block))] - start
        training.append(block[inside])
        start += len(block)
    assert low is not None
    assert high is not None
    found: dict[Precision, Quantiser] = {}
    for precision in precisions:
        if precision == "float16" and max(-low.min(), high.max()) > np.finfo(np.float16).max:
            continue
        if precision == "int8":
            step = ((high.astype(np.float64) - low) / 255).astype(np.float32)
            found[precision] = Quantiser(precision, low=low, step=step)
        elif precision == "pq":
            if rows >= _CENTROIDS:
                found[precision] = Quantiser(precision, codebook=_codebook(np.concatenate(training), rng))
        else:
            found[precision] = Quantiser(precision)
    return found


def _codebook(
    training: Float32[np.ndarray, "rows hidden"], rng: np.random.Generator
) -> Float32[np.ndarray, "pieces centroids width"]:
    from scipy.cluster.vq import kmeans2

    pieces = sub_vectors(training.shape[1])
    books = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)
        for part in np.split(training, pieces, axis=1):
            centroids, _ = kmeans2(part, _CENTROIDS, _KMEANS_ITERATIONS, minit="points", rng=rng)
            books.append(centroids)
    return np.stack(books).astype(np.float32)


def recall(
    quantisers: dict[Precision, Quantiser], blocks: Blocks, rows: int, *, queries: int, most_rows: int, seed: int
) -> dict[Precision, float]:
    """Measures recall@10 of an exact cosine search in decoded vectors, against the same search in the original ones.

    The queries are original vectors of the table; a query's own row is excluded. A neighbour counts as found if it is
    at least as similar as the true tenth one, so that equal sequences are interchangeable.

    Args:
        quantisers: The quantisers to compare.
        blocks: Reads the vectors.
        rows: Number of vectors.
        queries: Number of queries, sampled from the rows searched.
        most_rows: Number of rows to search, sampled from all.
        seed: Random seed of both samples.

    Returns:
        The mean share of the ten nearest neighbours that are found, by precision.
    """
    rng = np.random.default_rng(seed)
    searched = np.sort(rng.choice(rows, min(rows, most_rows), replace=False))
    query_rows = np.sort(rng.choice(searched, min(len(searched), queries), replace=False))
    k = min(NEIGHBOURS, len(searched) - 1)
    if k < 1:
        return dict.fromkeys(quantisers, 1.0)
    queried = np.concatenate([block[inside] for inside, block, _ in _selected(blocks, query_rows)])
    unit = _normalised(queried)
    best_true = np.full((len(query_rows), k), -np.inf)
    best = {
        name: (np.full((len(query_rows), k), -np.inf), np.full((len(query_rows), k), -np.inf)) for name in quantisers
    }
    for inside, block, positions in _selected(blocks, searched):
        vectors = block[inside]
        own = query_rows[:, None] == positions[None, :]
        true = np.where(own, -np.inf, unit @ _normalised(vectors).T)
        best_true = -np.partition(-np.concatenate([best_true, true], 1), k - 1, axis=1)[:, :k]
        for name, quantiser in quantisers.items():
            near = np.where(own, -np.inf, unit @ _normalised(quantiser.decode(quantiser.encode(vectors))).T)
            all_near = np.concatenate([best[name][0], near], 1)
            all_true = np.concatenate([best[name][1], true], 1)
            order = np.argsort(-all_near, axis=1, kind="stable")[:, :k]
            best[name] = np.take_along_axis(all_near, order, 1), np.take_along_axis(all_true, order, 1)
    tenth = best_true.min(1, keepdims=True) - 1e-12
    return {name: float((best[name][1] >= tenth).mean()) for name in quantisers}


def _normalised(vectors: Float32[np.ndarray, "rows hidden"]) -> Float[np.ndarray, "rows hidden"]:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _selected(
    blocks: Blocks, wanted: Int[np.ndarray, " picked"]
) -> Iterator[tuple[Int[np.ndarray, " here"], Float32[np.ndarray, "rows hidden"], Int[np.ndarray, " here"]]]:
    """Yields, for each block with wanted rows, their positions in the block, the block, and their row numbers."""
    start = 0
    for block in blocks():
        positions = wanted[(wanted >= start) & (wanted < start + len(block))]
        if len(positions):
            yield positions - start, block, positions
        start += len(block)
