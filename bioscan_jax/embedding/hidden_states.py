"""The states of every token, before any pooling."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.config import EmbedConfig
from bioscan_jax.data.batching import fixed_shapes, make_batches
from bioscan_jax.data.encode import EncodedBlock
from bioscan_jax.devices.memory import memory_errors
from bioscan_jax.embedding.step import make_embed_step


class HiddenStates:
    """Computes the states of the tokens of sequences that are in memory."""

    def __init__(self, loaded: LoadedModel, embed: EmbedConfig) -> None:
        self._loaded, self._batch_tokens = loaded, embed.batch_tokens
        graph, _ = nnx.split(loaded.model)
        _, self._state = make_embed_step(loaded.model, loaded.layout, embed)

        @partial(jax.jit, static_argnums=2)
        def step(state: nnx.State, ids: Int[Array, "b s"], layer: int | None) -> Float[Array, "*layers b s d"]:
            model = nnx.merge(graph, state)
            return model.hidden_states(ids) if layer is None else model.hidden_state(ids, layer=layer)

        self._step = step

    def __call__(
        self, blocks: Iterable[EncodedBlock], max_tokens: int, layer: int | None
    ) -> list[Float32[np.ndarray, "*layers tokens d"]]:
        """Returns one array for each sequence of some blocks, CLS first.

        Args:
            blocks: Blocks in which every sequence is kept and is one row of tokens.
            max_tokens: Longest token row allowed.
            layer: One hidden state; all of them, stacked from the embeddings to the last, if absent.

        Raises:
            InputError: A batch does not fit into the memory of the devices.
        """
        found: list[Any] = []
        config, layout, vocabulary = self._loaded.config, self._loaded.layout, self._loaded.vocabulary
        kept = 1 if layer is not None else config.num_hidden_layers + 1
        for block in blocks:
            tokens, first = block.views.tokens, len(found)
            found += [None] * len(tokens)
            if not len(tokens):
                continue
            shapes = fixed_shapes(
                tokens.lengths,
                int(tokens.lengths.max()),
                max_tokens,
                most=2,
                devices=layout.data_devices,
                tokens_per_device=max(1, self._batch_tokens // kept),
            )
            for batch in make_batches(tokens, shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id):
                rows, width = batch.ids.shape
                with memory_errors(
                    f"computing the states of {rows} x {width} tokens", "pass fewer or shorter sequences"
                ):
                    placed = jax.device_put(batch.ids, layout.batched(2))
                    states = np.asarray(self._step(self._state, placed, layer), np.float32)
                for i, row in enumerate(batch.rows.tolist()):
                    found[first + row] = states[..., i, : int(tokens.lengths[row]), :]
        return found
