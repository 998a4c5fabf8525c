"""Taxonomic heads: log-probabilities of the taxa at each of the seven ranks, the taxon tree, and predictions.

The class axis is padded to a multiple of 128, so that a checkpoint can be restored on any number of devices that
divides it; padding has log-probability -inf and no gradient. From `SHARD_MIN_CLASSES` classes the class axis is split
over the devices (logical axis `taxa`): each holds its part of the kernel and of the logits, and the small pooled
vectors are gathered instead. Below that each device holds the whole kernel, the logits are split along the batch, and
only the kernel's gradient is communicated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.sharding import Axes, Layout

HeadKind = Literal["independent", "marginal", "cosine"]
CLASS_MULTIPLE = 128
"""Class axes are padded to a multiple of this."""
SHARD_MIN_CLASSES = 32_768
"""From this many classes the class axis is split; the kernel, its gradient and two moments at 2,560 features take 1.3 GB."""
_SMALLEST_SQUARE = 1e-24
"""Added to squared norms, so that the cosine with a zero vector has a value and a gradient."""
_SHARDED: Axes = (None, "taxa")
_REPLICATED: Axes = (None, None)


class _Level(NamedTuple):
    """Mapping from groups of leaves at the rank below to groups and taxa at one rank."""

    group_of: Int32[np.ndarray, " below"] | None
    """Group of each group of the rank below; None if both are the same."""
    groups: int
    taxa: Int32[np.ndarray, " taxa"]
    """Group of each taxon of the rank; groups without a taxon at this rank are absent."""


@dataclass(frozen=True, eq=False)
class TaxonTree:
    """The taxa of each rank, and the paths to the leaves (taxa without children).

    All of it is numpy and constant when a program is compiled; nothing has the size of leaves x taxa.

    Raises:
        ValueError: There is no leaf, a leaf occurs twice, or a taxon is in no path or in two lineages.
    """

    sizes: tuple[int, ...]
    """Number of taxa at each of the seven ranks."""
    leaf_paths: Int32[np.ndarray, "leaves 7"]
    """Taxon at each rank, -1 below the leaf and where a rank is unknown; row i is class i of `MarginalHead`."""

    def __post_init__(self) -> None:
        if not len(self.leaf_paths):
            raise ValueError("a taxon tree needs at least one leaf")
        assert self.levels

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaxonTree):
            return NotImplemented
        return other is self or (self.sizes == other.sizes and np.array_equal(self.leaf_paths, other.leaf_paths))

    def __hash__(self) -> int:
        return hash((self.sizes, len(self.leaf_paths)))

    @cached_property
    def levels(self) -> tuple[_Level, ...]:
        """One mapping per rank, species first; leaves with the same path down to a rank form one group there."""
        paths, levels = self.leaf_paths, []
        for rank in reversed(range(len(RANKS))):
            distinct, group_of = np.unique(paths[:, : rank + 1], axis=0, return_inverse=True)
            if len(distinct) == len(paths):
                group_of = None
            elif rank == len(RANKS) - 1:
                raise ValueError("two leaves of the taxon tree have the same path")
            else:
                paths, group_of = distinct, group_of.reshape(-1).astype(np.int32)
            named = np.flatnonzero(paths[:, rank] >= 0)
            counts = np.bincount(paths[named, rank], minlength=self.sizes[rank])
            wrong = np.flatnonzero((counts != 1) | (np.arange(len(counts)) >= self.sizes[rank]))
            if len(wrong):
                raise ValueError(
                    f"{RANKS[rank]} {wrong[0]} is in {counts[wrong[0]]} lineages; each of the {self.sizes[rank]} "
                    "taxa from 0 up is in one"
                )
            taxa = np.empty(len(named), np.int32)
            taxa[paths[named, rank]] = named
            levels.append(_Level(group_of, len(paths), taxa))
        return tuple(levels)

    @cached_property
    def ancestors(self) -> tuple[Int32[np.ndarray, " taxa"], ...]:
        """Node number (see `first_node`) of the nearest known taxon above each taxon of a rank; 0 if there is none."""
        found = []
        for rank, size in enumerate(self.sizes):
            row = np.zeros(size, np.int64)
            named = self.leaf_paths[:, rank] >= 0
            row[self.leaf_paths[named, rank]] = np.flatnonzero(named)
            above = np.zeros(size, np.int32)
            for higher in range(rank):
                taxon = self.leaf_paths[row, higher]
                above = np.where(taxon >= 0, self.first_node(higher) + taxon, above).astype(np.int32)
            found.append(above)
        return tuple(found)

    def first_node(self, rank: int) -> int:
        """Returns the node number of taxon 0 of a rank; nodes number all taxa from 1, rank after rank."""
        return 1 + sum(self.sizes[:rank])


class RankLogProbs(NamedTuple):
    """Log-probabilities of the taxa at each rank, from either head."""

    log_probs: tuple[Float[Array, "b _padded"], ...]
    """One float32 array per rank; -inf in the padding and at ranks without taxa."""


def padded_size(classes: int, multiple: int = CLASS_MULTIPLE) -> int:
    """Returns the length of a class axis: the next multiple of `multiple`, at least one."""
    return max(1, -(-classes // multiple)) * multiple


class Dense(nnx.Module):
    """`x @ kernel + bias` on vectors, with float32 parameters, products and sums."""

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


class Cosine(nnx.Module):
    """`scale` times the cosine between vectors and one trained vector per class (NormFace, arXiv:1704.06369)."""

    def __init__(self, inputs: int, outputs: int, *, scale: float, axes: Axes, init: Callable, rngs: nnx.Rngs):
        self.scale = scale
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32), logical_axes=axes)

    def __call__(self, x: Float[Array, "b d"]) -> Float32[Array, "b out"]:
        """Applies the layer; the cosine with a zero vector is 0."""
        kernel, x = self.kernel[...], x.astype(jnp.float32)
        product = jnp.dot(x, kernel, precision="highest", preferred_element_type=jnp.float32)
        # The product is divided, not the kernel, of which there would be a second copy.
        return self.scale * product * inverse_norms(x, axis=1) * inverse_norms(kernel, axis=0)


def inverse_norms(x: Float32[Array, "n m"], axis: int) -> Float32[Array, "_ _"]:
    """Returns 1 over the Euclidean norms along an axis, which is kept; finite, also its gradient, for zero vectors."""
    return jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + _SMALLEST_SQUARE)


class SoftmaxLayer(nnx.Module):
    """A layer (linear, or cosine with a scale) and log-softmax over `classes` classes; the class axis is padded."""

    def __init__(self, inputs: int, classes: int, *, multiple: int, rngs: nnx.Rngs, scale: float | None = None):
        init = jax.nn.initializers.normal(0.02)
        self.classes = classes
        width = padded_size(classes, multiple)
        self.sharded = width >= SHARD_MIN_CLASSES
        axes = _SHARDED if self.sharded else _REPLICATED
        if scale is None:
            self.linear = Dense(inputs, width, axes=axes, init=init, rngs=rngs)
        else:
            self.linear = Cosine(inputs, width, scale=scale, axes=axes, init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"], layout: Layout | None) -> Float32[Array, "b padded"]:
        """Returns log-probabilities; -inf in the padding."""
        if layout is not None and self.sharded:
            x = jax.lax.with_sharding_constraint(x, layout.replicated())
        logits = _constrain(self.linear(x), layout, self.sharded)
        if not self.classes:
            return jnp.full_like(logits, -jnp.inf)
        real = jnp.arange(logits.shape[1]) < self.classes
        return jax.nn.log_softmax(jnp.where(real[None, :], logits, -jnp.inf), axis=1)


class IndependentHead(nnx.Module):
    """One softmax per rank, each over that rank's taxa; of linear functions, or of cosines times `scale`."""

    def __init__(
        self,
        hidden_size: int,
        tree: TaxonTree,
        *,
        rngs: nnx.Rngs,
        multiple: int = CLASS_MULTIPLE,
        scale: float | None = None,
    ):
        self.scale = scale
        self.ranks = nnx.Dict(
            {
                rank: SoftmaxLayer(hidden_size, size, multiple=multiple, rngs=rngs, scale=scale)
                for rank, size in zip(RANKS, tree.sizes, strict=True)
            }
        )

    def __call__(self, pooled: Float[Array, "b d"], layout: Layout | None = None) -> RankLogProbs:
        """Returns log-probabilities of the taxa; the probabilities of each rank sum to 1."""
        return RankLogProbs(tuple(self.ranks[rank](pooled, layout) for rank in RANKS))

    def of_labels(
        self, pooled: Float[Array, "b d"], labels: Int32[Array, "b 7"], layout: Layout | None = None
    ) -> Float32[Array, "b 7"]:
        """Returns the log-probability of one taxon per rank for each row; any number where the label is -1."""
        return pick(self(pooled, layout), labels)


class MarginalHead(nnx.Module):
    """One softmax over the leaves; a taxon's probability is the sum over the leaves below it.

    At a rank where some leaf has no taxon (its rank is unknown, or the leaf is above it) the probabilities sum to less
    than 1.
    """

    def __init__(self, hidden_size: int, tree: TaxonTree, *, rngs: nnx.Rngs, multiple: int = CLASS_MULTIPLE):
        self.tree, self.multiple = tree, multiple
        self.leaves = SoftmaxLayer(hidden_size, len(tree.leaf_paths), multiple=multiple, rngs=rngs)

    def __call__(self, pooled: Float[Array, "b d"], layout: Layout | None = None) -> RankLogProbs:
        """Returns log-probabilities of the taxa."""
        groups, found, sharded = self.leaves(pooled, layout), [], self.leaves.sharded
        for level in self.tree.levels:
            if level.group_of is not None:
                width = padded_size(level.groups, self.multiple)
                groups = _segment_logsumexp(groups, level.group_of, level.groups, width)
                groups = _constrain(groups, layout, sharded)
            width = padded_size(len(level.taxa), self.multiple)
            index = np.pad(level.taxa, (0, width - len(level.taxa)), constant_values=groups.shape[1])
            taxa = jnp.take(groups, index, axis=1, mode="fill", fill_value=-jnp.inf)
            found.append(_constrain(taxa, layout, sharded))
        return RankLogProbs(tuple(reversed(found)))

    def of_labels(
        self, pooled: Float[Array, "b d"], labels: Int32[Array, "b 7"], layout: Layout | None = None
    ) -> Float32[Array, "b 7"]:
        """Returns the log-probability of one taxon per rank for each row; any number where the label is -1.

        The leaves below a taxon are found by comparing their paths with the label, so that training needs neither
        scatters nor gathers along the classes, which TPUs do slowly: only sums, also where the classes are split. The
        largest of these leaves is subtracted before the exponentials, as in `__call__`.
        """
        leaves = self.leaves(pooled, layout)
        paths = np.full((len(RANKS), leaves.shape[1]), -2, np.int32)  # padding is below no taxon
        paths[:, : len(self.tree.leaf_paths)] = self.tree.leaf_paths.T
        found = []
        for rank, path in enumerate(paths):
            label = labels[:, rank, None]
            # All leaves for an unknown label: a sum over nothing would have no finite gradient.
            below = (jnp.asarray(path)[None, :] == label) | ((label < 0) & (path >= -1)[None, :])
            found.append(_masked_logsumexp(leaves, below))
        return jnp.stack(found, axis=1)


def pick(ranks: RankLogProbs, labels: Int32[Array, "b 7"]) -> Float32[Array, "b 7"]:
    """Returns the log-probability of each row's taxon at each rank; that of taxon 0 where the label is -1."""
    index = jnp.maximum(labels, 0)
    found = [
        jnp.take_along_axis(log_probs.astype(jnp.float32), index[:, rank, None], axis=1)[:, 0]
        for rank, log_probs in enumerate(ranks.log_probs)
    ]
    return jnp.stack(found, axis=1)


def make_head(
    kind: HeadKind,
    hidden_size: int,
    tree: TaxonTree,
    *,
    rngs: nnx.Rngs,
    multiple: int = CLASS_MULTIPLE,
    scale: float = config.COSINE_SCALE,
) -> IndependentHead | MarginalHead:
    """Makes a head with random parameters.

    Args:
        kind: Type of head.
        hidden_size: Width of the vectors it classifies.
        tree: The taxa; their order is the order of the classes.
        rngs: Random keys for the kernels.
        multiple: Class axes are padded to a multiple of this; the number of devices must divide it.
        scale: Factor of the cosines, for kind `cosine`.
    """
    if kind == "marginal":
        return MarginalHead(hidden_size, tree, rngs=rngs, multiple=multiple)
    return IndependentHead(hidden_size, tree, rngs=rngs, multiple=multiple, scale=scale if kind == "cosine" else None)


def _constrain(x: Float[Array, "b padded"], layout: Layout | None, sharded: bool) -> Float[Array, "b padded"]:
    """Constrains logits to be split along the classes if `sharded`, else along the batch."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.stored(_SHARDED) if sharded else layout.batched(2))


def _segment_logsumexp(
    x: Float[Array, "b below"], group_of: Int32[np.ndarray, " real"], groups: int, width: int
) -> Float[Array, "b width"]:
    """Returns the log of the sum of exponentials in each group, -inf in the padding up to `width`.

    Columns of `x` past `group_of` are padding and ignored. The maximum of each group is subtracted first, so that a
    group of tiny probabilities keeps its value and a finite gradient.
    """
    index = np.pad(group_of, (0, x.shape[1] - len(group_of)), constant_values=width)
    empty = jnp.full((x.shape[0], width), -jnp.inf, x.dtype)
    largest = jax.lax.stop_gradient(empty.at[:, index].max(jax.lax.stop_gradient(x), mode="drop"))
    shifted = jnp.exp(x - jnp.take(largest, index, axis=1, mode="fill", fill_value=0.0))
    # 1 in columns without a group: log(0) has no finite gradient.
    start = jnp.broadcast_to((np.arange(width) >= groups).astype(x.dtype), empty.shape)
    return jnp.log(start.at[:, index].add(shifted, mode="drop")) + largest


def _masked_logsumexp(x: Float[Array, "b padded"], mask: Bool[Array, "b padded"]) -> Float[Array, " b"]:
    """Returns the log of the sum of exponentials where `mask` is True, which it must be somewhere in each row."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(mask, x, -jnp.inf), axis=1))
    shifted = jnp.where(mask, x - largest[:, None], -jnp.inf)
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=1)) + largest


def predict(ranks: RankLogProbs, tree: TaxonTree, kind: HeadKind) -> tuple[Int32[Array, "b 7"], Float32[Array, "b 7"]]:
    """Chooses a taxon at each rank, with its probability.

    `independent` and `cosine` take the most probable taxon of each rank. `marginal` descends the tree: at each rank it takes the
    most probable taxon whose nearest known ancestor is the taxon chosen last, so that the choice is always the path to
    a leaf.

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
