"""The jitted step from token ids to pooled vectors, and its compiled executables."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.barcodes.views import Views
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.model.pooling import Pooling, pool
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
    shapes: dict[BatchShape, Callable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._step, self._state = make_embed_step(self.model, self.layout, self.embed)

    def __call__(self, ids: Int[np.ndarray, "b s"]) -> Float[Array, "b d"]:
        """Starts a batch on the devices and returns without waiting for it."""
        sharding = self.layout.batched(2)
        shape = BatchShape(*ids.shape)
        if shape not in self.shapes:
            start = time.perf_counter()
            abstract = jax.ShapeDtypeStruct(ids.shape, jnp.int32, sharding=sharding)
            self.shapes[shape] = self._step.lower(self._state, abstract).compile()
            self.seconds += time.perf_counter() - start
        return self.shapes[shape](self._state, jax.device_put(ids, sharding))


def collect(batches: Sequence[tuple[TokenBatch, Array]], views: int, width: int) -> Float[np.ndarray, "views d"]:
    """Waits for the batches' vectors and puts them in the order of the views."""
    vectors = np.empty((views, width), np.float32)
    for batch, result in batches:
        vectors[batch.rows] = np.asarray(result)[: len(batch.rows)]
    return vectors


def sequence_vectors(
    vectors: Float[np.ndarray, "views d"], views: Views, sequences: int, pooling: Pooling
) -> Float[np.ndarray, "sequences d"]:
    """Averages the vectors of each sequence's views, weighted by the tokens that each was pooled over.

    The sum is formed in float64, so that a single view passes unchanged.

    Args:
        vectors: One per view.
        views: Which sequence each view belongs to, and its tokens.
        sequences: Number of sequences; each has at least one view.
        pooling: `mean_no_cls` does not count CLS in the weights.
    """
    if len(views.owner) == sequences:
        return vectors
    weights = views.tokens.lengths - (pooling == "mean_no_cls")
    first = np.searchsorted(views.owner, np.arange(sequences))
    total = np.add.reduceat(vectors.astype(np.float64) * weights[:, None], first, axis=0)
    return (total / np.add.reduceat(weights, first)[:, None]).astype(np.float32)
