"""Projection of vectors onto a plane."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from bioscan_jax.errors import InputError

Method = Literal["pacmap", "pca"]
_COMPONENTS = 50
"""Principal components passed to PaCMAP; vectors of deep models have thousands of correlated coordinates."""
_MIN_VECTORS = 50
"""Distinct vectors that PaCMAP needs for its ten neighbours, five mid-near and twenty far pairs of each vector."""


@dataclass(frozen=True)
class Projection:
    """Points of a plane, one per vector."""

    points: Float32[np.ndarray, "rows 2"]
    method: str
    """How the points were computed, as text for the reader."""


def project(vectors: Float32[np.ndarray, "rows hidden"], method: Method, seed: int) -> Projection:
    """Projects vectors onto a plane so that vectors of similar direction lie close together.

    Vectors are scaled to length 1, as in cosine search. Rows with identical vectors share one point.
    PaCMAP: Wang, Huang, Rudin, Shaposhnik 2021 (jmlr.org/papers/v22/20-1061.html). The same vectors and seed give the
    same points on the same machine.

    Args:
        vectors: Finite vectors.
        method: `pacmap`, or `pca` for the first two principal components.
        seed: Random seed of PaCMAP.

    Raises:
        InputError: PaCMAP is requested and not installed.
    """
    from sklearn.decomposition import PCA

    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units, inverse = np.unique(vectors / np.where(norms > 0, norms, 1), axis=0, return_inverse=True)
    enough = method == "pacmap" and len(units) >= _MIN_VECTORS
    count = min(_COMPONENTS if enough else 2, *units.shape)
    variance = 1.0
    if len(units) > 1:
        fit = PCA(count, svd_solver="covariance_eigh" if units.shape[1] <= 4096 else "randomized", random_state=seed)
        points = fit.fit_transform(units - units.mean(axis=0))
        variance = float(fit.explained_variance_ratio_.sum())
    else:
        points = np.zeros((len(units), count))
    if enough:
        points = _pacmap(points.astype(np.float32), seed)
        text = f"PaCMAP of {count} principal components ({variance:.0%} of the variance), seed {seed}"
    else:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
        few = f"; too few distinct vectors ({len(units)}) for PaCMAP" if method == "pacmap" else ""
        text = f"the first two principal components ({variance:.0%} of the variance){few}"
    return Projection(points.astype(np.float32)[inverse.reshape(-1)], text)


def _pacmap(points: Float32[np.ndarray, "rows components"], seed: int) -> Float32[np.ndarray, "rows 2"]:
    with _errors_only("pacmap"):
        try:
            import numba
            from pacmap import PaCMAP
        except ImportError as error:
            raise InputError(
                f"the map needs PaCMAP ({error}); pip install 'bioscan_jax[report]', or pass --projection pca"
            ) from error
        # One thread, so that the order of sums, and with it the map, does not depend on the number of cores. Threads
        # that synchronise hundreds of times a second are no faster on a busy machine.
        threads = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            fit = PaCMAP(n_neighbors=10, random_state=seed, apply_pca=False)
            return np.asarray(fit.fit_transform(points, init="pca"), np.float32)
        finally:
            numba.set_num_threads(threads)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Silences warnings of a logger: PaCMAP warns whenever a seed is set."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
