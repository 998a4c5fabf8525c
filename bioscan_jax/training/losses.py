"""Loss functions, all in float32: cross-entropy over the seven ranks, and masked language modelling."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.model.heads import RankLogProbs

DEFAULT_RANK_WEIGHTS = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
"""Weights from kingdom to species."""


def known_rows(labels: Int32[Array, "b 7"]) -> Float32[Array, "7"]:
    """Counts the rows whose taxon is known at each rank: the denominators for micro-batches."""
    return jnp.sum(labels >= 0, axis=0, dtype=jnp.float32)


def rank_losses(
    ranks: RankLogProbs, labels: Int32[Array, "b 7"], denominators: Float[Array, "7"] | None = None
) -> Float32[Array, "7"]:
    """Returns the mean cross-entropy at each rank over rows with a known taxon; 0 without gradient if there are none.

    Args:
        ranks: Log-probabilities from either head.
        labels: Indices of taxa; -1 is unknown.
        denominators: Known rows of the whole batch, if this is a micro-batch: losses and gradients then add up to
            those of the batch. Ones give plain sums. By default, the known rows of `labels`.
    """
    if denominators is None:
        denominators = known_rows(labels)
    sums = []
    for rank, log_probs in enumerate(ranks.log_probs):
        known = labels[:, rank] >= 0
        index = jnp.where(known, labels[:, rank], 0)
        picked = jnp.take_along_axis(log_probs.astype(jnp.float32), index[:, None], axis=1)[:, 0]
        sums.append(jnp.sum(jnp.where(known, -picked, 0.0)))
    return jnp.stack(sums) / jnp.maximum(denominators.astype(jnp.float32), 1.0)


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
