"""The vote of the nearest references and of taxonomic heads, from kingdom down to species."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Float64, Int32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, read_heads
from bioscan_jax.errors import InputError
from bioscan_jax.matching.queries import Embedder
from bioscan_jax.matching.reference import Taxa, numbered

POWER = 32.0
"""Used until `scripts/calibrate.py` has fitted one: a tenth more distance, a twentieth of the weight."""
NEAREST_COSINE_DISTANCE = 1e-6
"""float32 knows no smaller one."""
_MOST_TAXA = 8
"""The most probable taxa of each rank that get a voice."""


@dataclass(frozen=True, eq=False)
class HeadVotes:
    """The taxa that a head holds most probable at each rank, each with its lineage."""

    lineages: Int32[np.ndarray, "queries taxa 7"]
    probabilities: Float32[np.ndarray, "queries taxa 7"]
    """Of a row of `lineages` at its own rank; 0 at the others."""
    entropy: Float32[np.ndarray, " queries"]
    """Of the head's species, in nats."""


@dataclass(frozen=True, eq=False)
class Votes:
    """The best guess at each rank, and what speaks for it."""

    taxa: Int32[np.ndarray, "queries 7"]
    """-1 where no candidate has a name."""
    share: Float64[np.ndarray, "queries 7"]
    """Of the weight; the raw confidence."""
    near: Float64[np.ndarray, "queries 7"]
    """Distance to the nearest reference of that taxon."""
    other: Float64[np.ndarray, "queries 7"]
    """Distance to the nearest reference of another one; where all candidates agree, to the farthest candidate."""
    nearest: Float64[np.ndarray, " queries"]
    """Distance to the nearest reference."""


def vote(
    lineages: Int32[np.ndarray, "queries candidates 7"],
    distances: Float64[np.ndarray, "queries candidates"],
    power: float,
    heads: HeadVotes | None = None,
    head_weight: float = 0.0,
) -> Votes:
    """Names each query by its candidates, nearest first.

    A candidate at distance d weighs (d_nearest / d) ** power: the nearest weighs 1, and equal distances weigh the
    same. The distance is (differences + 1/2) / (columns + 1) for an alignment, 1 - cosine otherwise. With a head, the
    candidates' weights are scaled to sum to 1 at each rank and pooled linearly with its probabilities p (Stone 1961,
    doi:10.1214/aoms/1177704873): (1 - head_weight) * share + head_weight * p.

    From kingdom down, the taxon with most weight wins; after that only candidates of its lineage can win at the ranks
    below. A candidate that does not know a rank has no voice there and keeps it below. Of taxa with equal weight the
    one with the nearest candidate wins. The share of a taxon is taken of all candidates that know the rank, whatever
    their lineage, so that a name under a doubtful order is doubtful too; it cannot exceed that of the rank above.

    Args:
        lineages: Numbers of taxa, -1 where unknown.
        distances: Above 0; inf where there is no candidate.
        power: How steeply the weight falls.
        heads: What a head says, if there is one.
        head_weight: Its share in the vote.
    """
    queries, candidates = distances.shape
    nearest = distances.min(axis=1, initial=np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isfinite(distances), (nearest[:, None] / distances) ** power, 0.0)
    by_rank = weights[:, :, None] * (lineages >= 0)
    everyone = lineages
    if heads is not None and head_weight > 0:
        total = by_rank.sum(axis=1, keepdims=True)
        by_rank = by_rank / np.where(total > 0, total, 1) * (1 - head_weight)
        by_rank = np.concatenate([by_rank, heads.probabilities * head_weight], axis=1)
        everyone = np.concatenate([lineages, heads.lineages], axis=1)
    taxa, share = _descend(everyone, by_rank, unknown_above=heads is not None and head_weight > 0)
    far = np.where(np.isfinite(distances), distances, -np.inf).max(axis=1, initial=-np.inf)
    near, other = np.empty((queries, len(RANKS))), np.empty((queries, len(RANKS)))
    for rank in range(len(RANKS)):
        of = lineages[:, :, rank]
        same = of == taxa[:, None, rank]
        near[:, rank] = np.where(same & (of >= 0), distances, np.inf).min(axis=1, initial=np.inf)
        other[:, rank] = np.where(~same & (of >= 0), distances, np.inf).min(axis=1, initial=np.inf)
    # A head may name a taxon that no candidate has: it is at least as far as the farthest of them.
    near, other = (np.where(np.isfinite(found), found, far[:, None]) for found in (near, other))
    return Votes(taxa, share, near, other, nearest)


def _descend(
    lineages: Int32[np.ndarray, "queries candidates 7"],
    weights: Float[np.ndarray, "queries candidates 7"],
    *,
    unknown_above: bool,
) -> tuple[Int32[np.ndarray, "queries 7"], Float64[np.ndarray, "queries 7"]]:
    """The heaviest path from the root, and the share of each taxon on it.

    Args:
        lineages: Taxa.
        weights: Of each candidate at each rank.
        unknown_above: The weights are shares already: they are not divided by their sum.
    """
    queries = len(lineages)
    taxa, share = np.full((queries, len(RANKS)), -1, np.int32), np.zeros((queries, len(RANKS)))
    fits: Bool[np.ndarray, "queries candidates"] = np.ones(lineages.shape[:2], bool)
    ceiling = np.ones(queries)
    for rank in range(len(RANKS)):
        of, weight = lineages[:, :, rank], weights[:, :, rank]
        query, candidate = np.nonzero(fits & (of >= 0) & (weight > 0))
        if not len(query):
            continue
        size = int(of.max()) + 1
        groups, group_of = np.unique(query * size + of[query, candidate], return_inverse=True)
        total = np.bincount(group_of, weight[query, candidate])
        first = np.full(len(groups), lineages.shape[1])
        np.minimum.at(first, group_of, candidate)
        order = np.lexsort((first, -np.round(total, 9), groups // size))
        found, at = np.unique(groups[order] // size, return_index=True)
        best = order[at]
        taxa[found, rank] = groups[best] % size
        whole = np.ones(len(found)) if unknown_above else weight.sum(axis=1)[found]
        share[found, rank] = np.minimum(total[best] / whole, ceiling[found])
        ceiling[found] = share[found, rank]
        chosen = taxa[:, rank]
        fits &= (chosen[:, None] < 0) | (of < 0) | (of == chosen[:, None])
    return taxa, share


def open_heads(directory: str, embedder: Embedder) -> Heads:
    """Reads heads that were trained on such vectors.

    Raises:
        InputError: There are none, or they take vectors of another kind.
    """
    heads = read_heads(Path(directory).expanduser(), embedder.loaded.layout)
    last = embedder.loaded.config.num_hidden_layers
    if heads.pooling != embedder.embed.pooling or embedder.embed.layer != last:
        raise InputError(
            f"--heads {directory}: they take the {heads.pooling} of the last layer, the table has the "
            f"{embedder.embed.pooling} of layer {embedder.embed.layer} of {last}; embed the reference so, or leave it out"
        )
    width = embedder.loaded.config.hidden_size
    if heads.hidden_size != width:
        raise InputError(
            f"--heads {directory}: they take vectors of {heads.hidden_size} numbers, the table has {width}; pass heads "
            "of its model"
        )
    return heads


def head_votes(heads: Heads, vectors: Float32[np.ndarray, "queries hidden"], taxa: Taxa) -> HeadVotes:
    """The most probable taxa of each rank, numbered as the reference's are.

    Args:
        heads: From `open_heads`.
        vectors: Of the queries.
        taxa: Of the reference and the heads' label space.
    """
    log_probs = heads.head(jnp.asarray(vectors)).log_probs
    lineages, probabilities = [], []
    codes = [
        numbered(pa.array(known, pa.string()), names)
        for known, names in zip(heads.space.names, taxa.names, strict=True)
    ]
    species = np.asarray(log_probs[-1])
    for rank in range(len(RANKS)):
        size = len(heads.space.names[rank])
        found = np.exp(np.asarray(log_probs[rank])[:, :size])
        best = np.argsort(-found, axis=1, kind="stable")[:, :_MOST_TAXA]
        paths: Int32[np.ndarray, "queries taxa 7"] = heads.space.paths[rank][best]
        known = [
            np.where(paths[..., r] >= 0, np.append(codes[r], -1)[paths[..., r]], -1).astype(np.int32)
            for r in range(len(RANKS))
        ]
        lineages.append(np.stack(known, axis=2))
        voice = np.zeros((*best.shape, len(RANKS)), np.float32)
        voice[:, :, rank] = np.take_along_axis(found, best, 1)
        probabilities.append(voice)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(np.isfinite(species), np.exp(species) * species, 0.0).sum(axis=1)
    return HeadVotes(np.concatenate(lineages, 1), np.concatenate(probabilities, 1), entropy.astype(np.float32))
