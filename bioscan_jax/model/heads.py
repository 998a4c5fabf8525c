"""Heads that give log-probabilities of the taxa at each of the seven ranks, and the predictions read from them.

The class axis is padded to a multiple of 128, so that a checkpoint restores on any such number of devices; padding
has log-probability -inf and gets no gradient. From `SPLIT_FROM` classes on the class axis is split over the devices
(logical axis `taxa`): each keeps its share of the kernel and of the logits, and the small pooled vectors are gathered
instead. Below that the kernel is whole on each device, the logits are split along the batch like all else, and nothing
but the kernel's gradient is ever sent.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.sharding import Axes, Layout
from bioscan_jax.model.tree import TaxonTree

HeadKind = Literal["independent", "marginal"]
CLASS_MULTIPLE = 128
"""Class axes are padded to a multiple of this."""
SPLIT_FROM = 32_768
"""Classes whose kernel, at 2,560 features with its gradient and two moments, takes 1.3 GB."""
_SPLIT: Axes = (None, "taxa")
_WHOLE: Axes = (None, None)


class RankLogits(NamedTuple):
    """What both heads give."""

    log_probs: tuple[Float[Array, "b _padded"], ...]
    """One array a rank, float32; -inf in the padding and at ranks without taxa."""


def padded(classes: int, multiple: int = CLASS_MULTIPLE) -> int:
    """Length of a class axis: at least one `multiple`."""
    return max(1, -(-classes // multiple)) * multiple


class Dense(nnx.Module):
    """`x @ kernel + bias` on vectors: float32 parameters, products and sums."""

    def __init__(self, inputs: int, outputs: int, *, axes: Axes, init: Callable, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32), logical_axes=axes)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32), logical_axes=axes[1:])

    def __call__(self, x: Float[Array, "b d"]) -> Float32[Array, "b out"]:
        """Applies the layer."""
        product = jax.lax.dot_general(
            x.astype(jnp.float32),
            self.kernel[...],
            (((1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return product + self.bias[...][None, :]


class Classes(nnx.Module):
    """A linear layer whose softmax is over `classes` classes, padded."""

    def __init__(self, inputs: int, classes: int, *, multiple: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.classes = classes
        self.split = padded(classes, multiple) >= SPLIT_FROM
        axes = _SPLIT if self.split else _WHOLE
        self.linear = Dense(inputs, padded(classes, multiple), axes=axes, init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"], layout: Layout | None) -> Float32[Array, "b padded"]:
        """Log-probabilities; -inf in the padding."""
        if layout is not None and self.split:
            x = jax.lax.with_sharding_constraint(x, layout.replicated())
        logits = _placed(self.linear(x), layout, self.split)
        if not self.classes:
            return jnp.full_like(logits, -jnp.inf)
        real = jnp.arange(logits.shape[1]) < self.classes
        return jax.nn.log_softmax(jnp.where(real[None, :], logits, -jnp.inf), axis=1)


class IndependentHead(nnx.Module):
    """One softmax a rank, each over that rank's taxa."""

    def __init__(self, hidden_size: int, tree: TaxonTree, *, rngs: nnx.Rngs, multiple: int = CLASS_MULTIPLE):
        self.ranks = nnx.Dict(
            {
                rank: Classes(hidden_size, size, multiple=multiple, rngs=rngs)
                for rank, size in zip(RANKS, tree.sizes, strict=True)
            }
        )

    def __call__(self, pooled: Float[Array, "b d"], layout: Layout | None = None) -> RankLogits:
        """Log-probabilities of the taxa; each rank's sum to 1."""
        return RankLogits(tuple(self.ranks[rank](pooled, layout) for rank in RANKS))


class MarginalHead(nnx.Module):
    """One softmax over the taxa without children; a taxon's probability is the sum of those below it.

    At a rank where some leaf has no taxon (an unknown rank, or the leaf is above it) the probabilities sum to less
    than 1.
    """

    def __init__(self, hidden_size: int, tree: TaxonTree, *, rngs: nnx.Rngs, multiple: int = CLASS_MULTIPLE):
        self.tree, self.multiple = tree, multiple
        self.leaves = Classes(hidden_size, len(tree.leaf_paths), multiple=multiple, rngs=rngs)

    def __call__(self, pooled: Float[Array, "b d"], layout: Layout | None = None) -> RankLogits:
        """Log-probabilities of the taxa."""
        groups, found, split = self.leaves(pooled, layout), [], self.leaves.split
        for level in self.tree.levels:
            if level.group_of is not None:
                width = padded(level.groups, self.multiple)
                groups = _segment_logsumexp(groups, level.group_of, level.groups, width)
                groups = _placed(groups, layout, split)
            width = padded(len(level.taxa), self.multiple)
            index = np.pad(level.taxa, (0, width - len(level.taxa)), constant_values=groups.shape[1])
            taxa = jnp.take(groups, index, axis=1, mode="fill", fill_value=-jnp.inf)
            found.append(_placed(taxa, layout, split))
        return RankLogits(tuple(reversed(found)))


def make_head(
    kind: HeadKind, hidden_size: int, tree: TaxonTree, *, rngs: nnx.Rngs, multiple: int = CLASS_MULTIPLE
) -> IndependentHead | MarginalHead:
    """Makes a head with random parameters.

    Args:
        kind: Which of the two.
        hidden_size: Features of the vectors it takes.
        tree: The taxa; also decides what the classes of a saved head mean.
        rngs: For the kernels.
        multiple: Class axes are padded to a multiple of it, which the number of devices must divide.
    """
    head = {"independent": IndependentHead, "marginal": MarginalHead}[kind]
    return head(hidden_size, tree, rngs=rngs, multiple=multiple)


def _placed(x: Float[Array, "b padded"], layout: Layout | None, split: bool) -> Float[Array, "b padded"]:
    """Split along the classes, or along the batch."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.stored(_SPLIT) if split else layout.batched(2))


def _segment_logsumexp(
    x: Float[Array, "b below"], group_of: Int32[np.ndarray, " real"], groups: int, width: int
) -> Float[Array, "b width"]:
    """Log of the sum of the exponentials in each group, -inf in the padding up to `width`.

    What `x` has past `group_of` is padding and left out. The largest of each group is taken out first, so that a group
    of tiny probabilities keeps its value and a finite gradient.
    """
    index = np.pad(group_of, (0, x.shape[1] - len(group_of)), constant_values=width)
    nothing = jnp.full((x.shape[0], width), -jnp.inf, x.dtype)
    largest = jax.lax.stop_gradient(nothing.at[:, index].max(jax.lax.stop_gradient(x), mode="drop"))
    shifted = jnp.exp(x - jnp.take(largest, index, axis=1, mode="fill", fill_value=0.0))
    # One where there is no group: log(0) has no finite gradient.
    start = jnp.broadcast_to((np.arange(width) >= groups).astype(x.dtype), nothing.shape)
    return jnp.log(start.at[:, index].add(shifted, mode="drop")) + largest


def predict(ranks: RankLogits, tree: TaxonTree, kind: HeadKind) -> tuple[Int32[Array, "b 7"], Float32[Array, "b 7"]]:
    """Chooses a taxon at each rank, with its probability.

    `independent` takes each rank's most probable taxon by itself. `marginal` goes down the tree: at each rank the most
    probable of the taxa whose nearest known ancestor is the taxon chosen last, so that what is chosen is always the
    path to a leaf.

    Returns:
        Indices of taxa, -1 where the path has a gap or has ended (or the rank has no taxa); and probabilities, 0 there.
    """
    last = jnp.zeros(ranks.log_probs[0].shape[0], jnp.int32)
    chosen, confidence = [], []
    for rank, log_probs in enumerate(ranks.log_probs):
        missing = log_probs.shape[1] - tree.sizes[rank]
        if kind == "marginal":
            above = np.pad(tree.ancestors[rank], (0, missing), constant_values=-1)
            fits = jnp.asarray(above)[None, :] == last[:, None]
        else:
            fits = jnp.broadcast_to(jnp.arange(log_probs.shape[1]) < tree.sizes[rank], log_probs.shape)
        known = jnp.any(fits, axis=1)
        lowest = jnp.finfo(log_probs.dtype).min
        best = jnp.argmax(jnp.where(fits, jnp.maximum(log_probs, lowest), -jnp.inf), axis=1).astype(jnp.int32)
        probability = jnp.exp(jnp.take_along_axis(log_probs, best[:, None], axis=1)[:, 0])
        chosen.append(jnp.where(known, best, -1))
        confidence.append(jnp.where(known, jnp.minimum(probability, 1.0), 0.0))
        last = jnp.where(known, tree.first_node(rank) + best, last)
    return jnp.stack(chosen, axis=1), jnp.stack(confidence, axis=1)
