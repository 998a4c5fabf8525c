"""Names queries by a vote of their nearest references and of taxonomic heads, from kingdom down to species."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Float64, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, read_heads
from bioscan_jax.checkpoints.hub import resolve_part
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.errors import InputError
from bioscan_jax.matching.reference import Taxa, name_codes

_HEAD_WEIGHT = 0.5
"""Weight of a head in the vote without a calibration."""
_MOST_TAXA = 8
"""Number of most probable taxa per rank for which a head votes."""


@dataclass(frozen=True, kw_only=True)
class Voting:
    """How candidates are scored and weighted; a calibration fits it.

    Example:
        >>> Voting(power=8.0).weights(np.array([[0.1, 0.2, np.inf]])).tolist()
        [[1.0, 0.00390625, 0.0]]
    """

    identity_weight: float | None = None
    """Weight of the identity beside the cosine in a candidate's score; None where nothing is aligned."""
    saturation: float = 1.0
    """A query whose candidates all differ from it by more than this share of the bases is compared without transitions
    (A-G, C-T): so far away many have been overwritten by others, and more genera of COI barcodes are right without them.
    1: transitions always count."""
    power: float | None = None
    """A candidate at distance d has weight (d_nearest / d) ** power: equal distances have equal weights, and the unit of
    the distance does not matter, as cosines of different models differ in theirs."""
    temperature: float | None = None
    """In place of the power: weight exp((d_nearest - d) / temperature), the softmax of the scores."""
    head_weight: float = 0.0
    """Share of a head in the vote."""

    def __str__(self) -> str:
        """Describes the weights in one line."""
        if self.identity_weight is None:
            text = f"power {self.power:g}"
        else:
            text = f"cosine + {self.identity_weight:g} x identity (without transitions beyond {self.saturation:g}), "
            text += f"temperature {self.temperature:g}"
        return f"{text}, weight of the heads {self.head_weight:g}"

    def weights(
        self, distances: Float64[np.ndarray, "queries candidates"]
    ) -> Float64[np.ndarray, "queries candidates"]:
        """Returns the weight of each candidate: 1 for the nearest, 0 where the distance is inf."""
        nearest = distances.min(axis=1, initial=np.inf, keepdims=True)
        with np.errstate(invalid="ignore"):
            if self.temperature is not None:
                weights = np.exp((nearest - distances) / self.temperature)
            else:
                weights = (nearest / distances) ** self.power
        return np.where(np.isfinite(distances), weights, 0.0)


BY_SIMILARITY = Voting(power=32.0)
"""Without alignment and calibration: a candidate a tenth farther away has a twentieth of the weight."""
BY_SCORE = Voting(identity_weight=6.0, saturation=0.05, temperature=0.02)
"""With alignment, without a calibration: chosen by the genus of species held out of 15,868 COI barcodes."""


def default_voting(settings: config.IdentifyConfig, *, heads: bool) -> Voting:
    """Returns how candidates, and heads if there are any, vote without a calibration, with what the settings fix."""
    head_weight = _HEAD_WEIGHT if heads else 0.0
    if settings.rerank == "none":
        return dataclasses.replace(BY_SIMILARITY, head_weight=head_weight)
    names = ("identity_weight", "saturation", "temperature")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    return dataclasses.replace(BY_SCORE, head_weight=head_weight, **given)


@dataclass(frozen=True, eq=False)
class HeadVotes:
    """The most probable taxa of each rank according to a head, each with its lineage."""

    lineages: Int32[np.ndarray, "queries taxa 7"]
    probabilities: Float32[np.ndarray, "queries taxa 7"]
    """Probability of each row of `lineages` at its own rank; 0 at the other ranks."""
    entropy: Float32[np.ndarray, " queries"]
    """Entropy of the species probabilities, in nats."""


@dataclass(frozen=True, eq=False)
class Votes:
    """The winning taxon at each rank, and the evidence for it."""

    taxa: Int32[np.ndarray, "queries 7"]
    """-1 where no candidate has a name."""
    share: Float64[np.ndarray, "queries 7"]
    """Share of the weight: the uncalibrated confidence."""
    near: Float64[np.ndarray, "queries 7"]
    """Distance to the nearest reference of the winning taxon."""
    other: Float64[np.ndarray, "queries 7"]
    """Distance to the nearest reference of another taxon; where all candidates agree, to the farthest candidate."""
    nearest: Float64[np.ndarray, " queries"]
    """Distance to the nearest reference."""


def vote(
    lineages: Int32[np.ndarray, "queries candidates 7"],
    distances: Float64[np.ndarray, "queries candidates"],
    voting: Voting,
    heads: HeadVotes | None = None,
    shares: Float64[np.ndarray, "queries candidates 7"] | None = None,
) -> Votes:
    """Names each query by a weighted vote of its candidates, rank by rank.

    The candidates' weights are those of `voting`. With a head, they are scaled to sum to 1 at each rank and pooled
    linearly with its probabilities p (Stone 1961, doi:10.1214/aoms/1177704873): (1 - head_weight) * share +
    head_weight * p.

    From kingdom down, the taxon with the most weight wins; at the ranks below only candidates of its lineage can win.
    A candidate without a name at a rank does not vote there, but does at the ranks below. Of taxa with equal weight
    the one with the nearest candidate wins. The answer is the lineage of one candidate with the last name that won (the
    one with most names, then the nearest): ranks that it leaves blank stay blank, so that no name gets the ancestors of
    another. A taxon's share is that of all candidates with a name at the rank, whatever their lineage, so that a name
    under a doubtful order is doubtful too; it cannot exceed that of the named ranks above. A taxon is a name with its
    ancestors: where these contradict the answer's, an equal name is another taxon.

    Args:
        lineages: Codes of taxa, -1 where unknown; candidates sorted by distance.
        distances: Above 0; inf where there is no candidate.
        voting: How the weight falls with the distance, and the share of the head.
        heads: Taxa and probabilities of a head, if there is one.
        shares: Share of its weight that a candidate has at each rank, where several stand for one sequence.
    """
    nearest = distances.min(axis=1, initial=np.inf)
    head_weight = 0.0 if heads is None else voting.head_weight
    by_rank = voting.weights(distances)[:, :, None] * ((lineages >= 0) if shares is None else shares)
    every_lineage = lineages
    if heads is not None and head_weight > 0:
        total = by_rank.sum(axis=1, keepdims=True)
        by_rank = by_rank / np.where(total > 0, total, 1) * (1 - head_weight)
        by_rank = np.concatenate([by_rank, heads.probabilities * head_weight], axis=1)
        every_lineage = np.concatenate([lineages, heads.lineages], axis=1)
    taxa, share = _descend(every_lineage, by_rank, normalised=head_weight > 0)
    far = np.where(np.isfinite(distances), distances, -np.inf).max(axis=1, initial=-np.inf)
    named = lineages >= 0
    same = same_taxon(lineages, taxa)
    near, other = (
        np.where(found, distances[:, :, None], np.inf).min(axis=1, initial=np.inf) for found in (same, named & ~same)
    )
    # A head may name a taxon that no candidate has: its distance is at least that of the farthest candidate.
    near, other = (np.where(np.isfinite(found), found, far[:, None]) for found in (near, other))
    return Votes(taxa, share, near, other, nearest)


def without_names(votes: Votes, rows: Bool[np.ndarray, " queries"]) -> Votes:
    """Removes the names of some queries."""
    return dataclasses.replace(
        votes, taxa=np.where(rows[:, None], -1, votes.taxa), share=np.where(rows[:, None], 0.0, votes.share)
    )


def _descend(
    lineages: Int32[np.ndarray, "queries candidates 7"],
    weights: Float[np.ndarray, "queries candidates 7"],
    *,
    normalised: bool,
) -> tuple[Int32[np.ndarray, "queries 7"], Float64[np.ndarray, "queries 7"]]:
    """Returns the path with the most weight from the root down, and the share of each taxon on it.

    Args:
        lineages: Codes of taxa.
        weights: Weight of each candidate at each rank.
        normalised: The weights are shares already, and are not divided by their sum.
    """
    queries = len(lineages)
    taxa = np.full((queries, len(RANKS)), -1, np.int32)
    fits: Bool[np.ndarray, "queries candidates"] = np.ones(lineages.shape[:2], bool)
    last: Bool[np.ndarray, "queries candidates"] = np.zeros(lineages.shape[:2], bool)
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
        taxa[found, rank] = groups[order[at]] % size
        chosen = taxa[:, None, rank]
        last = np.where(chosen < 0, last, fits & (of == chosen) & (weight > 0))
        fits &= (chosen < 0) | (of < 0) | (of == chosen)
    if lineages.shape[1]:
        own = np.where(last, (lineages >= 0).sum(axis=2), -1).argmax(axis=1)
        taxa = np.where(np.any(last, axis=1, keepdims=True), lineages[np.arange(queries), own], -1).astype(np.int32)
    total = (weights * same_taxon(lineages, taxa)).sum(axis=1)
    whole = np.ones(total.shape) if normalised else weights.sum(axis=1)
    share = np.where(taxa >= 0, total / np.where(whole > 0, whole, 1), np.inf)
    return taxa, np.where(taxa >= 0, np.minimum.accumulate(np.minimum(share, 1), axis=1), 0.0)


def same_taxon(
    lineages: Int32[np.ndarray, "queries candidates 7"], taxa: Int32[np.ndarray, "queries 7"]
) -> Bool[np.ndarray, "queries candidates 7"]:
    """Tells at which ranks a candidate has the name of a path, and no other name than the path's above it."""
    equal, blank = lineages == taxa[:, None], (lineages < 0) | (taxa[:, None] < 0)
    return np.logical_and.accumulate(equal | blank, axis=2) & equal & ~blank


def open_heads(directory: str, encoder: Encoder) -> Heads:
    """Reads taxonomic heads that were trained on vectors like the table's.

    Raises:
        InputError: There are none, or they were trained on vectors of another kind.
    """
    if encoder.projection is not None:
        raise InputError(
            f"--heads {directory}: heads classify raw vectors, the table's are projected; leave --heads out"
        )
    heads = read_heads(resolve_part(directory, "heads"), encoder.layout)
    last = encoder.config.num_hidden_layers
    if heads.pooling != encoder.settings.pooling or encoder.settings.layer != last:
        raise InputError(
            f"--heads {directory}: they were trained on {heads.pooling} pooling of the last layer, the table has "
            f"{encoder.settings.pooling} pooling of layer {encoder.settings.layer} of {last}; embed the reference the same way, "
            "or leave --heads out"
        )
    width = encoder.config.hidden_size
    if heads.hidden_size != width:
        raise InputError(
            f"--heads {directory}: they were trained on vectors of {heads.hidden_size} numbers, the table has {width}; "
            "pass heads of its model"
        )
    return heads


def head_votes(heads: Heads, vectors: Float32[np.ndarray, "queries hidden"], taxa: Taxa) -> HeadVotes:
    """Returns a head's most probable taxa of each rank, with the codes of the reference.

    Args:
        heads: From `open_heads`.
        vectors: Vectors of the queries.
        taxa: Names of the reference and of the heads.
    """
    log_probs = heads.head(jnp.asarray(vectors)).log_probs
    lineages, probabilities = [], []
    codes = [
        name_codes(pa.array(known, pa.string()), names)
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
        by_rank = np.zeros((*best.shape, len(RANKS)), np.float32)
        by_rank[:, :, rank] = np.take_along_axis(found, best, 1)
        probabilities.append(by_rank)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(np.isfinite(species), np.exp(species) * species, 0.0).sum(axis=1)
    return HeadVotes(np.concatenate(lineages, 1), np.concatenate(probabilities, 1), entropy.astype(np.float32))
