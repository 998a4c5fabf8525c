"""The jitted step from token ids to pooled vectors, and its compiled executables."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.barcodes.views import Views
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.memory import needed_memory
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.errors import logger
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.pooling import Pooling, pool
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer

CACHED_TOKENS = 512
"""Tokens per call of a layer in float32 on one CPU device, so that intermediate results stay in its cache.

On 2 cores with 2 MiB of L2, batches of 72 x 112 tokens: v2-50M runs 1.16 times as fast as on whole batches, v1-500M 1.0.
"""


def make_embed_step(
    model: NucleotideTransformer, layout: Layout, embed: config.EmbedConfig
) -> tuple[Callable[[nnx.State, Int[Array, "b s"]], Float[Array, "b d"]], nnx.State]:
    """Makes the jitted step, and the parameters it takes.

    The step maps token ids, split over the batch, to one float32 vector per row, split likewise.

    Args:
        model: Its arrays may be abstract; then the step can only be lowered.
        layout: Where arrays live.
        embed: Pooling and layer.
    """
    graph, state = nnx.split(model)
    if layout.mesh.devices.flat[0].platform == "cpu":
        state = bfloat16_as_integers(state)
    pad = model.config.pad_token_id
    in_cache = layout.is_single_cpu and model.word_embeddings.dtype == jnp.float32

    def embed_step(state: nnx.State, ids: Int[Array, "b s"]) -> Float[Array, "b d"]:
        rows = cached_rows(*ids.shape) if in_cache else None
        hidden = nnx.merge(graph, state).hidden_state(ids, layer=embed.layer, layout=layout, rows=rows)
        return pool(layout.on_batch(hidden), ids, embed.pooling, pad)

    return jax.jit(embed_step, out_shardings=layout.batched(2)), state


def cached_rows(rows: int, tokens: int) -> int:
    """Returns the largest divisor of `rows` whose rows hold at most `CACHED_TOKENS` tokens; at least 1."""
    most = max(1, CACHED_TOKENS // tokens)
    return max(some for some in range(1, min(rows, most) + 1) if rows % some == 0)


def bfloat16_as_integers(state: nnx.State) -> nnx.State:
    """Reinterprets the layers' bfloat16 as 16-bit integers, without a copy; for CPU devices.

    XLA has no bfloat16 products on CPUs, and would widen the whole stack of layers before its loop: a float32 copy of
    the model. It leaves integers alone, and the model turns one layer at a time back to bfloat16.
    """

    def reinterpret(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        array = variable.get_value()
        if array.dtype != jnp.bfloat16 or "layers" not in path:
            return variable
        if isinstance(array, jax.ShapeDtypeStruct):
            return variable.replace(jax.ShapeDtypeStruct(array.shape, jnp.uint16, sharding=array.sharding))
        shards = [jax.device_put(np.asarray(s.data).view(np.uint16), s.device) for s in array.addressable_shards]
        return variable.replace(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))

    return nnx.from_flat_state([(path, reinterpret(path, variable)) for path, variable in nnx.to_flat_state(state)])


@dataclass
class CompiledSteps:
    """One executable per batch shape, compiled at first use; nothing else can trigger a compilation."""

    model: NucleotideTransformer
    layout: Layout
    embed: config.EmbedConfig
    seconds: float = 0.0
    """Spent compiling."""
    shapes: dict[BatchShape, jax.stages.Compiled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._step, self._state = make_embed_step(self.model, self.layout, self.embed)

    def __call__(self, ids: Int[np.ndarray, "b s"]) -> Float[Array, "b d"]:
        """Starts a batch on the devices and returns without waiting for it."""
        sharding = self.layout.batched(2)
        shape = BatchShape(*ids.shape)
        if shape not in self.shapes:
            start = time.perf_counter()
            self.shapes[shape] = self.compile(shape)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            if logger.isEnabledFor(logging.DEBUG) and (memory := needed_memory(self.shapes[shape])) is not None:
                logger.debug(
                    f"compiled batches of {shape.rows} x {shape.tokens} tokens in {seconds:.1f} s: "
                    f"{memory.total / 2**30:.2f} GiB on each device, weights included"
                )
        return self.shapes[shape](self._state, jax.device_put(ids, sharding))

    def compile(self, shape: BatchShape) -> jax.stages.Compiled:
        """Returns the executable for a shape, without keeping it."""
        sharding = self.layout.batched(2)
        abstract = jax.ShapeDtypeStruct((shape.rows, shape.tokens), jnp.int32, sharding=sharding)
        return self._step.lower(self._state, abstract).compile()


_COUNTED_ROWS = 32
"""Sequences whose tokens are counted at a time, in the processor's cache."""
MORE_ROWS, FEW_ROWS = 256, 16
"""Rows per device in one call of a projection; the smaller number where a block has no more."""


def rows_per_call(rows: int, layout: Layout) -> int:
    """Returns how many rows a block of `rows` is projected at a time.

    There are only two sizes: a matrix product may round a row differently among another number of rows.
    """
    return layout.data_devices * (FEW_ROWS if rows <= FEW_ROWS * layout.data_devices else MORE_ROWS)


class Projector:
    """Applies a projection on the devices, to any number of vectors."""

    def __init__(self, projection: Projection, layout: Layout) -> None:
        self._layout, self._projection = layout, jax.device_put(projection, layout.replicated())
        self._apply = jax.jit(lambda projection, vectors: projection(vectors), out_shardings=layout.batched(2))

    def __call__(
        self, vectors: Float32[np.ndarray, "n features"], block: int | None = None
    ) -> Float32[np.ndarray, "n dimension"]:
        """Projects vectors and waits for the results.

        Args:
            vectors: Any number of them.
            block: Number of vectors of the block that these are a part of, which decides how many are projected at a
                time.
        """
        size, started = rows_per_call(block or len(vectors), self._layout), []
        for first in range(0, len(vectors), size):
            part = np.zeros((size, vectors.shape[1]), np.float32)
            part[: len(vectors) - first] = vectors[first : first + size]
            started.append(self._apply(self._projection, jax.device_put(part, self._layout.batched(2))))
        found = [np.asarray(one) for one in started] or [np.zeros((0, self._projection.dimension), np.float32)]
        return np.concatenate(found)[: len(vectors)]


def can_count_tokens(model: TransformerConfig, embed: config.EmbedConfig) -> bool:
    """Returns whether pooled vectors depend only on how often each token occurs: the mean of embeddings without positions."""
    return (
        embed.pooling == "mean"
        and model.resolve_layer(embed.layer) == 0
        and model.position_embedding_type == "rotary"
        and not model.token_dropout
    )


def count_batches(views: Views, sequences: int, vocabulary: int, layout: Layout) -> list[TokenBatch]:
    """Counts the tokens of each sequence's views together, for `CountingSteps`.

    Args:
        views: Each sequence has at least one.
        sequences: Number of sequences.
        vocabulary: Number of token ids.
        layout: The devices.

    Returns:
        Batches of one shape, whose `ids` are the counts, int32 [rows, vocabulary].
    """
    size, batches = rows_per_call(sequences, layout), []
    starts = views.tokens.offsets[np.searchsorted(views.owner, np.arange(sequences + 1))]
    for first in range(0, sequences, size):
        bounds = starts[first : first + size + 1]
        rows = np.arange(first, first + len(bounds) - 1)
        counts = np.zeros((size, vocabulary), np.int32)
        for at in range(0, len(rows), _COUNTED_ROWS):
            some = bounds[at : at + _COUNTED_ROWS + 1]
            places = np.repeat(np.arange(0, (len(some) - 1) * vocabulary, vocabulary), np.diff(some))
            found = np.bincount(places + views.tokens.ids[some[0] : some[-1]], minlength=(len(some) - 1) * vocabulary)
            counts[at : at + len(some) - 1] = found.reshape(-1, vocabulary)
        batches.append(TokenBatch(counts, rows))
    return batches


class CountingSteps:
    """The step from token counts to projected, or raw, vectors: counts times embeddings, over the number of tokens.

    It equals pooling every view, averaging a sequence's views by their tokens, and projecting, up to rounding.
    """

    def __init__(self, model: NucleotideTransformer, layout: Layout, projection: Projection | None) -> None:
        self.model, self._layout = model, layout
        self.dimension = model.config.hidden_size if projection is None else projection.dimension
        self.seconds = 0.0
        self.shapes: dict[BatchShape, Callable] = {}
        self._projection = jax.device_put(projection, layout.replicated())

        def step(
            embeddings: Float[Array, "v d"], projection: Projection | None, counts: Int[Array, "b v"]
        ) -> Float[Array, "b dimension"]:
            weights = counts.astype(jnp.float32)
            total = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
            summed = jnp.dot(weights, embeddings.astype(jnp.float32), precision="highest")
            pooled = layout.on_batch(summed / total)
            return pooled if projection is None else projection(pooled)

        self._step = jax.jit(step, out_shardings=layout.batched(2))

    def __call__(self, ids: Int[np.ndarray, "b v"]) -> Float[Array, "b dimension"]:
        """Starts a batch of counts on the devices and returns without waiting for it."""
        sharding, shape = self._layout.batched(2), BatchShape(*ids.shape)
        embeddings = self.model.word_embeddings[...]
        if shape not in self.shapes:
            start = time.perf_counter()
            abstract = jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=sharding)
            self.shapes[shape] = self._step.lower(embeddings, self._projection, abstract).compile()
            self.seconds += time.perf_counter() - start
        return self.shapes[shape](embeddings, self._projection, jax.device_put(ids, sharding))


AVERAGED_ROWS = 1024
"""Views that are averaged at a time, which bounds the float64 copies."""


def sequence_vectors(
    vectors: Float[np.ndarray, "views d"], views: Views, sequences: range, pooling: Pooling
) -> Float[np.ndarray, "sequences d"]:
    """Averages the vectors of each sequence's views, weighted by the tokens that each was pooled over.

    The sum is formed in float64, for some sequences at a time, so that a single view passes unchanged.

    Args:
        vectors: One per view.
        views: Which sequence each view belongs to, and its tokens.
        sequences: Consecutive sequences to average; each has at least one view.
        pooling: `mean_no_cls` does not count CLS in the weights.
    """
    start = np.searchsorted(views.owner, np.arange(sequences.start, sequences.stop + 1))
    if start[-1] - start[0] == len(sequences):
        return vectors[start[0] : start[-1]]
    weights = views.tokens.lengths - (pooling == "mean_no_cls")
    averaged = np.empty((len(sequences), vectors.shape[1]), np.float32)
    cuts = np.unique(np.searchsorted(start[:-1], np.arange(start[0], start[-1], AVERAGED_ROWS)))
    cuts = cuts[cuts < len(sequences)]
    for i, j in zip(cuts, [*cuts[1:], len(sequences)], strict=True):
        some, first = slice(start[i], start[j]), start[i:j] - start[i]
        total = np.add.reduceat(vectors[some].astype(np.float64) * weights[some, None], first, axis=0)
        averaged[i:j] = total / np.add.reduceat(weights[some], first)[:, None]
    return averaged
