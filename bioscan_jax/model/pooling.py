"""Pools token states to one vector per row, in float32 on the device."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Pooling = Literal["mean", "mean_no_cls", "cls", "max"]


def pool(hidden: Float[Array, "b s d"], ids: Int[Array, "b s"], pooling: Pooling, pad: int) -> Float[Array, "b d"]:
    """Pools each row's states over its real tokens.

    `mean` includes CLS, as in the model card of the Nucleotide Transformer; `mean_no_cls` excludes it, except in a row
    without other tokens.

    Example:
        >>> ids = jnp.array([[3, 7, 8, 1]])  # CLS, two tokens, padding
        >>> pool(jnp.array([[[0.0], [2.0], [4.0], [9.0]]]), ids, "mean_no_cls", pad=1)
        Array([[3.]], dtype=float32)

    Args:
        hidden: States of one layer; summed in float32.
        ids: Token ids, CLS first, padded on the right; each row has at least CLS.
        pooling: The pooled statistic.
        pad: Id of the pad token.
    """
    hidden = hidden.astype(jnp.float32)
    if pooling == "cls":
        return hidden[:, 0]
    real = ids != pad
    if pooling == "max":
        return jnp.max(jnp.where(real[:, :, None], hidden, -jnp.inf), axis=1)
    if pooling == "mean_no_cls":
        real = _without_cls(real)
    return jnp.sum(jnp.where(real[:, :, None], hidden, 0.0), axis=1) / jnp.sum(real, axis=1, dtype=jnp.float32)[:, None]


def _without_cls(real: Bool[Array, "b s"]) -> Bool[Array, "b s"]:
    alone = jnp.sum(real, axis=1, keepdims=True) == 1
    return real.at[:, 0].set(alone[:, 0])
