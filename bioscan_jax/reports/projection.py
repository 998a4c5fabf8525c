"""Vectors as points of a plane."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from bioscan_jax.errors import InputError

Method = Literal["pacmap", "pca"]
COMPONENTS = 50
"""Principal components that PaCMAP is given; vectors of deep models have thousands of correlated coordinates."""
_LEAST = 50
"""Distinct vectors that PaCMAP needs for its ten neighbours, five mid-near and twenty far pairs each."""


@dataclass(frozen=True)
class Projection:
    """A map of vectors."""

    points: Float32[np.ndarray, "rows 2"]
    method: str
    """How it was made, for the reader."""


def project(vectors: Float32[np.ndarray, "rows hidden"], method: Method, seed: int) -> Projection:
    """Lays vectors out in a plane so that those of a small angle come to lie together.

    Vectors are brought to length 1, as the search by cosine sees them. Rows of identical vectors become one point.
    PaCMAP: Wang, Huang, Rudin, Shaposhnik 2021 (jmlr.org/papers/v22/20-1061.html). The same vectors and seed give the
    same map on the same machine.

    Args:
        vectors: All finite.
        method: `pacmap`, or `pca` for the first two principal components.
        seed: Of PaCMAP.

    Raises:
        InputError: PaCMAP is asked for and not installed.
    """
    from sklearn.decomposition import PCA

    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units, inverse = np.unique(vectors / np.where(norms > 0, norms, 1), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    enough = method == "pacmap" and len(units) >= _LEAST
    count = min(COMPONENTS if enough else 2, *units.shape)
    centred = units - units.mean(axis=0)
    share = 1.0
    if len(units) > 1:
        fit = PCA(count, svd_solver="covariance_eigh" if units.shape[1] <= 4096 else "randomized", random_state=seed)
        points = fit.fit_transform(centred)
        share = float(fit.explained_variance_ratio_.sum())
    else:
        points = np.zeros((len(units), count))
    if enough:
        points = _pacmap(points.astype(np.float32), seed)
        told = f"PaCMAP of {count} principal components ({share:.0%} of the variance), seed {seed}"
    else:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
        few = f"; too few distinct vectors ({len(units)}) for PaCMAP" if method == "pacmap" else ""
        told = f"the first two principal components ({share:.0%} of the variance){few}"
    return Projection(points.astype(np.float32)[inverse], told)


def _pacmap(points: Float32[np.ndarray, "rows components"], seed: int) -> Float32[np.ndarray, "rows 2"]:
    with _quiet("pacmap"):
        try:
            import numba
            from pacmap import PaCMAP
        except ImportError as error:
            raise InputError(
                f"the map needs PaCMAP ({error}); pip install 'bioscan_jax[report]', or pass --projection pca"
            ) from error
        # One thread: the order of sums, and so the map, does not depend on the cores; and threads that wait for each
        # other hundreds of times a second are no faster on a busy machine
        threads = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            fit = PaCMAP(n_neighbors=10, random_state=seed, apply_pca=False)
            return np.asarray(fit.fit_transform(points, init="pca"), np.float32)
        finally:
            numba.set_num_threads(threads)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the remarks of a library that warns of having been given a seed."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
