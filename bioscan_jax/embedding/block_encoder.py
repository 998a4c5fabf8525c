"""How the blocks of one input are computed: settings, batch shapes and executables."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.barcodes.views import Views
from bioscan_jax.config import EmbedConfig
from bioscan_jax.data.batching import BatchShape, fitted_shapes, make_batches
from bioscan_jax.data.encode import Encoding
from bioscan_jax.devices.memory import out_of_memory
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.embedding.dispatch import BatchTooLarge
from bioscan_jax.embedding.fitting import advise_batch_tokens
from bioscan_jax.embedding.step import (
    CompiledSteps,
    CountingSteps,
    Projector,
    count_batches,
    rows_per_call,
    sequence_vectors,
)


@dataclass(frozen=True, kw_only=True)
class BlockEncoder:
    """An encoder for one input: its settings, its batch shapes and their executables."""

    steps: CompiledSteps | CountingSteps
    encoding: Encoding
    embed: EmbedConfig
    layout: Layout
    shapes: tuple[BatchShape, ...] = ()
    spare: tuple[BatchShape, ...] = ()
    """The shapes that may be added for a block that `shapes` fit badly."""
    projector: Projector | None = None

    def batches(self, views: Views, sequences: int, first: int = 0) -> list[TokenBatch]:
        """Packs the views of some sequences into batches, to be passed to `steps`, in the order of their first rows.

        Args:
            views: The views.
            sequences: Number of sequences.
            first: Leave out the batches that no sequence from this one on needs.
        """
        if isinstance(self.steps, CountingSteps):
            found = count_batches(views, sequences, self.steps.model.config.vocab_size, self.layout)
            needed = first
        else:
            vocabulary = self.encoding.vocabulary
            shapes = fitted_shapes(views.tokens.lengths, self.shapes, self.spare)
            found = make_batches(views.tokens, shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id)
            needed = int(np.searchsorted(views.owner, self.first_computed(first, sequences)))
        return sorted((one for one in found if one.rows.max() >= needed), key=lambda one: int(one.rows.min()))

    def buffer(self, views: Views, sequences: int) -> Float32[np.ndarray, "rows d"]:
        """Returns where the batches' results go: a row for each view, or for each sequence where tokens are counted."""
        if isinstance(self.steps, CountingSteps):
            return np.empty((sequences, self.steps.dimension), np.float32)
        return np.empty((len(views.owner), self.steps.model.config.hidden_size), np.float32)

    def finished(self, waiting: TokenBatch | None, views: Views, sequences: int) -> int:
        """Returns how many sequences, from the first, are done when `waiting` is the first batch that is not."""
        if waiting is None:
            return sequences
        row = int(waiting.rows.min())
        return row if isinstance(self.steps, CountingSteps) else self.first_computed(int(views.owner[row]), sequences)

    def first_computed(self, sequence: int, sequences: int) -> int:
        """Returns the first of the sequences that are projected in one call with this one; itself without a projection."""
        return sequence if self.projector is None else sequence - sequence % rows_per_call(sequences, self.layout)

    def vectors(
        self, results: Float32[np.ndarray, "rows d"], views: Views, some: range, sequences: int
    ) -> Float32[np.ndarray, "some dimension"]:
        """Returns one vector for each of `some` of the sequences, whose results are there."""
        if isinstance(self.steps, CountingSteps):
            return results[some.start : some.stop]
        vectors = sequence_vectors(results, views, some, self.embed.pooling)
        return vectors if self.projector is None else self.projector(vectors, sequences)

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Raises `BatchTooLarge` in its block, which is over the dispatcher's, as an InputError with a batch that fits."""
        try:
            yield
        except BatchTooLarge as error:
            shape, advice = error.shape, "free memory on the devices"
            if isinstance(self.steps, CompiledSteps):
                shapes = [shape, *self.shapes[-1:]]
                advice = advise_batch_tokens(self.steps.compile, shapes, self.layout, "embed.batch_tokens")
            task = f"embedding a batch of {shape.rows:,} x {shape.tokens} tokens"
            raise out_of_memory(task, error.__cause__ or error, advice) from error

    def tokens(self, batch: TokenBatch, views: Views) -> tuple[Int64[np.ndarray, " rows"], int]:
        """Returns the tokens of each of a batch's views, and how many it holds, padding included."""
        if not isinstance(self.steps, CountingSteps):
            return views.tokens.lengths[batch.rows], batch.ids.size
        bounds = np.searchsorted(views.owner, [batch.rows[0], batch.rows[-1] + 1])
        return views.tokens.lengths[bounds[0] : bounds[1]], int(batch.ids.sum())
