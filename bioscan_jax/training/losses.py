"""Loss functions, all in float32: cross-entropy over the seven ranks, neighbours, and masked language modelling."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.model.heads import inverse_norms

DEFAULT_RANK_WEIGHTS = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
"""Weights from kingdom to species."""


def known_rows(labels: Int32[Array, "b 7"]) -> Float32[Array, "7"]:
    """Counts the rows whose taxon is known at each rank: the denominators for micro-batches."""
    return jnp.sum(labels >= 0, axis=0, dtype=jnp.float32)


def rank_losses(
    log_probs: Float[Array, "b 7"], labels: Int32[Array, "b 7"], denominators: Float[Array, "7"] | None = None
) -> Float32[Array, "7"]:
    """Returns the mean cross-entropy at each rank over rows with a known taxon; 0 without gradient if there are none.

    Args:
        log_probs: Log-probability of each row's taxon at each rank, from a head's `of_labels`.
        labels: Indices of taxa; -1 is unknown.
        denominators: Known rows of the whole batch, if this is a micro-batch: losses and gradients then add up to
            those of the batch. Ones give plain sums. By default, the known rows of `labels`.
    """
    if denominators is None:
        denominators = known_rows(labels)
    sums = jnp.sum(jnp.where(labels >= 0, -log_probs.astype(jnp.float32), 0.0), axis=0)
    return sums / jnp.maximum(denominators.astype(jnp.float32), 1.0)


def total_loss(losses: Float[Array, "7"], weights: Sequence[float] = DEFAULT_RANK_WEIGHTS) -> Float[Array, ""]:
    """Returns the weighted sum of the losses over the ranks.

    Raises:
        ValueError: There are not seven weights.
    """
    if len(weights) != len(RANKS):
        raise ValueError(f"{len(weights)} rank weights {tuple(weights)}; pass seven, {', '.join(RANKS)}")
    return jnp.sum(losses * jnp.asarray(weights, losses.dtype))


def combine(
    sequence_loss: Float[Array, ""], metadata_loss: Float[Array, ""], metadata_weight: float = 0.3
) -> Float[Array, ""]:
    """Returns (1 - metadata_weight) x sequence_loss + metadata_weight x metadata_loss."""
    return (1.0 - metadata_weight) * sequence_loss + metadata_weight * metadata_loss


def nca_loss(
    similarity: Float[Array, "n n"], positive: Bool[Array, "n n"], candidate: Bool[Array, "n n"]
) -> Float[Array, ""]:
    """Returns the mean of -log of the softmax share that falls on positives, over rows with any; 0 if there are none.

    This is neighbourhood components analysis (Goldberger, Roweis, Hinton, Salakhutdinov 2004).

    Args:
        similarity: Scaled cosines.
        positive: The right neighbours; those that are no candidates do not count.
        candidate: The rows that the softmax is taken over.
    """
    positive = positive & candidate
    some = positive.any(axis=1)
    whole = jax.nn.logsumexp(jnp.where(candidate, similarity, -1e9), axis=1)
    right = jax.nn.logsumexp(jnp.where(positive, similarity, -1e9), axis=1)
    return jnp.where(some, whole - right, 0.0).sum() / jnp.maximum(some.sum(), 1)


def neighbour_loss(
    similarity: Float[Array, "n n"],
    taxa: Int32[Array, "n 7"],
    weights: tuple[float, float, float, float],
    *,
    own: Bool[Array, "n n"] | None = None,
) -> Float[Array, ""]:
    """Returns the weighted sum of `nca_loss` at order, family, genus and species.

    At genus the candidates are the rows of other species, at family those of other genera, at order those of other
    families, so that a genus is learned between its species; rows whose taxon at the rank is unknown are left out.

    Args:
        similarity: Scaled cosines between two rows of each taxon, or of rows among each other.
        taxa: Taxa of the rows; -1 is unknown.
        weights: Of order, family, genus and species.
        own: True where both are the same row, which is no neighbour of itself.
    """
    total = jnp.zeros(())
    for rank, weight in zip(range(len(RANKS) - len(weights), len(RANKS)), weights, strict=True):
        names = taxa[:, rank]
        known = names >= 0
        same = (names[:, None] == names[None]) & known[:, None]
        candidate = jnp.broadcast_to(known[None], same.shape)
        if rank + 1 < len(RANKS):
            below = taxa[:, rank + 1]
            candidate = candidate & ~((below[:, None] == below[None]) & (below >= 0)[:, None])
        if own is not None:
            candidate = candidate & ~own
        total = total + weight * nca_loss(similarity, same, candidate)
    return total


def contrastive_loss(
    vectors: Float32[Array, "n d"], taxa: Int32[Array, "n 7"], scale: float, weights: tuple[float, float, float, float]
) -> Float32[Array, ""]:
    """Returns `neighbour_loss` of the rows of a batch among each other, by scaled cosines.

    Args:
        vectors: Vectors of any length; a zero vector has cosine 0 with all.
        taxa: Taxa of the rows; -1 is unknown.
        scale: Factor of the cosines.
        weights: Of order, family, genus and species.
    """
    of_unit = vectors * inverse_norms(vectors, axis=1)
    cosines = jnp.dot(of_unit, of_unit.T, precision="highest")
    return neighbour_loss(scale * cosines, taxa, weights, own=jnp.eye(len(vectors), dtype=bool))


def mask_tokens(
    key: Array,
    ids: Int32[Array, "b s"],
    *,
    mask_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
    rate: float = 0.15,
) -> tuple[Int32[Array, "b s"], Bool[Array, "b s"]]:
    """Selects tokens to predict and masks them (Devlin et al. 2019, arXiv:1810.04805).

    Each ordinary token is selected with probability `rate`, and at least one of each row that has any. Of the selected
    tokens 80% become the mask token, 10% a random ordinary token, and 10% are kept.

    Args:
        key: JAX random key.
        ids: Token ids, which are also the targets.
        mask_id: Id of the mask token.
        special_ids: Ids that are never selected and never inserted: pad, CLS, mask and the like.
        vocab_size: Number of ids.
        rate: Expected share of selected tokens.

    Returns:
        The masked ids, and True where a token is to be predicted.

    Raises:
        ValueError: `special_ids` lacks the mask token, or leaves no ordinary token.
    """
    ordinary = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.asarray(special_ids, np.int32))
    if mask_id not in special_ids or not len(ordinary):
        raise ValueError(f"special_ids {tuple(special_ids)} must have mask_id {mask_id} and leave ordinary tokens")
    choose, change, draw = jax.random.split(key, 3)
    eligible = jnp.asarray(np.isin(np.arange(vocab_size), ordinary))[ids]
    chance = jnp.where(eligible, jax.random.uniform(choose, ids.shape), jnp.inf)
    selected = eligible & ((chance < rate) | (chance == jnp.min(chance, axis=1, keepdims=True)))
    fate = jax.random.uniform(change, ids.shape)
    random_ids = jnp.asarray(ordinary)[jax.random.randint(draw, ids.shape, 0, len(ordinary))]
    hidden = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random_ids, ids))
    return jnp.where(selected, hidden, ids), selected


def masked_lm_loss(
    logits: Float[Array, "b s v"],
    targets: Int[Array, "b s"],
    selected: Bool[Array, "b s"],
    denominator: Float[Array, ""] | Int[Array, ""] | None = None,
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy over the selected tokens; 0 without gradient if there are none.

    Args:
        logits: Logits over the vocabulary.
        targets: Token ids before masking.
        selected: True where a token is to be predicted.
        denominator: Selected tokens of the whole batch, if this is a micro-batch.
    """
    if denominator is None:
        denominator = jnp.sum(selected, dtype=jnp.float32)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=2)[:, :, 0]
    return jnp.sum(jnp.where(selected, -picked, 0.0)) / jnp.maximum(denominator.astype(jnp.float32), 1.0)
