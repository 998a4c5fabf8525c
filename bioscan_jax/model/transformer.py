"""The Nucleotide Transformer: from token ids to hidden states, and the masked-language-model head."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bioscan_jax.devices.sharding import Layout
from bioscan_jax.model.attention import AttentionChoice, attention_function, attention_setting, choose_attention
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.layers import Layer, LayerNorm, Linear, RowKeys, rotary_tables, split_row_keys

TRAINED_MASK_FRACTION = 0.15 * 0.8
"""Fraction of tokens masked in pre-training; `token_dropout` rescales by it (ESM, Rives et al. 2021)."""


class LanguageModelHead(nnx.Module):
    """Dense, GELU, LayerNorm, decoder: logits over the vocabulary."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, v = config.hidden_size, config.vocab_size
        self.dense = Linear(d, d, axes=("hidden", None), bias=True, config=config, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config, dtype=dtype)
        self.decoder = Linear(d, v, axes=("hidden", "vocab"), bias=True, config=config, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        """Returns float32 logits."""
        return self.decoder(self.norm(jax.nn.gelu(self.dense(hidden), approximate=False)))


class NucleotideTransformer(nnx.Module):
    """A v1 or v2 Nucleotide Transformer; the parameters of its layers are stacked along a leading axis.

    One with 0 layers is its embeddings alone: it has neither the final LayerNorm nor a language-model head.

    Example:
        >>> from bioscan_jax.model.config import PRESETS
        >>> model = NucleotideTransformer(PRESETS["tiny-v2"], rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[3, 10, 11, 12], [3, 20, 1, 1]])  # CLS, 6-mers, padding (1)
        >>> model.hidden_state(ids).shape
        (2, 4, 64)
        >>> model.hidden_states(ids).shape  # embeddings and two layers
        (3, 2, 4, 64)
    """

    def __init__(
        self, config: TransformerConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, lm_head: bool = False
    ):
        """Initialises random parameters of `dtype`; `lm_head` adds the masked-language-model head."""
        init = jax.nn.initializers.normal(config.initializer_range)
        d = config.hidden_size
        self.config = config
        # Full float32 products also on TPU and GPU, where "default" has fewer bits (on a TPU, one bfloat16 pass).
        self.float32_products: Literal["highest", "default"] = "highest"
        self.attention: AttentionChoice = "auto"
        self.word_embeddings = nnx.Param(
            init(rngs.params(), (config.vocab_size, d), dtype), logical_axes=("vocab", "hidden")
        )
        learned = config.position_embedding_type == "absolute"
        self.position_embeddings = (
            nnx.Param(
                init(rngs.params(), (config.max_position_embeddings, d), dtype), logical_axes=("position", "hidden")
            )
            if learned
            else None
        )

        if not config.num_hidden_layers:
            self.layers = self.final_norm = self.lm_head = None
            return

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = LayerNorm(config, dtype=dtype)
        self.lm_head = LanguageModelHead(config, dtype=dtype, rngs=rngs) if lm_head else None

    def embed_tokens(self, ids: Int[Array, "b s"], layout: Layout | None = None) -> Float[Array, "b s d"]:
        """Returns token plus position embeddings (hidden state 0).

        With `token_dropout`, mask tokens are zero and all tokens are scaled by (1 - 0.12) / (1 - masked fraction),
        also at inference.
        """
        config = self.config
        table, positions = self.word_embeddings, self.position_embeddings
        if layout is not None:
            table, positions = layout.gather((table, positions))
        real = ids != config.pad_token_id
        x = jnp.take(table[...], ids, axis=0)
        dtype = x.dtype
        x = x.astype(jnp.float32)
        if config.token_dropout:
            masked = ids == config.mask_token_id
            fraction = jnp.sum(masked, axis=1, dtype=jnp.float32) / jnp.sum(real, axis=1, dtype=jnp.float32)
            x = jnp.where(masked[:, :, None], 0.0, x)
            x = x * (1.0 - TRAINED_MASK_FRACTION) / (1.0 - fraction)[:, None, None]
        if positions is not None:
            index = jnp.cumsum(real, axis=1) * real + config.pad_token_id
            x = x + jnp.take(positions[...], index, axis=0).astype(jnp.float32)
        return jnp.where(real[:, :, None], x, 0.0).astype(dtype)

    def hidden_state(
        self,
        ids: Int[Array, "b s"],
        *,
        layer: int = -1,
        layout: Layout | None = None,
        keys: RowKeys | None = None,
        remat: bool = False,
        rows: int | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the states after one layer.

        Args:
            ids: Token ids, padded on the right with the pad token; each row has at least one token.
            layer: 0 for the embeddings, k for the residual stream after k layers, -1 (or the number of layers) for
                the last states, after the final LayerNorm.
            layout: Placement of parameters and activations; None for a single device.
            keys: Random keys of the adapters' dropout; None for no dropout.
            remat: Keep only each layer's input for the backward pass and recompute the rest.
            rows: Rows that a layer processes at a time, a divisor of the batch size; None for all.

        Raises:
            InputError: `layer` is out of range.
        """
        depth = self.config.resolve_layer(layer)
        if self.layers is None:
            return self.embed_tokens(ids, layout)
        x, _ = self._run(ids, depth, layout, lambda x: None, keys, remat, rows)
        return self.normalise(x, layout) if depth == self.config.num_hidden_layers else x

    def hidden_states(self, ids: Int[Array, "b s"]) -> Float[Array, "layers_plus_1 b s d"]:
        """Returns all hidden states, as transformers does; the last is after the final LayerNorm."""
        first = self.embed_tokens(ids)
        if self.layers is None:
            return first[None]
        x, middle = self._run(ids, self.config.num_hidden_layers, None, lambda x: x)
        assert middle is not None
        last = self.normalise(x).astype(x.dtype)
        return jnp.concatenate([first[None], middle[:-1], last[None]])

    def logits(self, hidden: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        """Returns masked-language-model logits of last hidden states.

        Raises:
            ValueError: The model has no language-model head.
        """
        if self.lm_head is None:
            raise ValueError("this model has no language-model head; make or load it with lm_head=True")
        with jax.default_matmul_precision(self.matmul_precision):
            return self.lm_head(hidden)

    @property
    def matmul_precision(self) -> str:
        """JAX precision of the matrix products; it has no effect on bfloat16 parameters."""
        return self.float32_products if self.word_embeddings.dtype == jnp.float32 else "default"

    def normalise(self, x: Float[Array, "b s d"], layout: Layout | None = None) -> Float[Array, "b s d"]:
        """Applies the final LayerNorm, in float32."""
        norm = self.final_norm
        assert norm is not None
        if layout is not None:
            graph, state = nnx.split(norm)
            norm = nnx.merge(graph, layout.gather(state))
        return norm(x)

    def _run(
        self,
        ids: Int[Array, "b s"],
        depth: int,
        layout: Layout | None,
        keep: Callable,
        keys: RowKeys | None = None,
        remat: bool = False,
        rows: int | None = None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "kept b s d"] | None]:
        mask = ids != self.config.pad_token_id
        rotary = None
        if self.config.position_embedding_type == "rotary":
            rotary = rotary_tables(ids.shape[1], self.config.head_dim)
        config = self.config
        heads, head_dim = config.num_attention_heads, config.head_dim
        setting = attention_setting(layout, heads=heads, head_dim=head_dim, dtype=self.word_embeddings.dtype)
        attend = attention_function(choose_attention(self.attention, setting, ids.shape[1]), layout)
        assert self.layers is not None
        graph, stack = nnx.split(self.layers)
        # A slice of the stack would be a copy of these layers in each call; a layer taken by its number is none.
        part = depth < jax.tree.leaves(stack)[0].shape[0]
        numbers = jnp.arange(depth)
        layer_keys = None if keys is None else split_row_keys(keys, depth)

        def step(x: Array, layer: tuple[nnx.State | Array, RowKeys | None]) -> tuple[Array, Array | None]:
            state, row_keys = layer
            if part:
                state = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, state, keepdims=False), stack)
            state = jax.tree.map(_as_bfloat16, state)
            if layout is not None:
                x, state = layout.on_batch(x), layout.gather(state)
            module = nnx.merge(graph, state)
            x = _by_rows(rows, lambda x, mask, keys: module(x, mask, rotary, keys, attend), x, mask, row_keys)
            return x, keep(x)

        with jax.default_matmul_precision(self.matmul_precision):
            body = jax.checkpoint(step) if remat else jax.checkpoint(step, policy=_is_saved, prevent_cse=False)
            return jax.lax.scan(body, self.embed_tokens(ids, layout), (numbers if part else stack, layer_keys))


def first_layers(model: NucleotideTransformer, depth: int) -> NucleotideTransformer:
    """Returns a model with copies of the first layers of another, and the rest of its parameters.

    It gives the same states up to layer `depth`; once the other model is gone, the memory of its later layers is free.
    The arrays may be abstract.
    """
    if model.layers is None or depth == model.config.num_hidden_layers:
        return model

    def cut(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        array = variable.get_value()
        if "layers" not in path:
            return variable
        if isinstance(array, jax.ShapeDtypeStruct):
            shape = (depth, *array.shape[1:])
            return variable.replace(jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding))
        return variable.replace(jax.jit(lambda stack: stack[:depth], out_shardings=array.sharding)(array))

    graph, state = nnx.split(model)
    return nnx.merge(graph, nnx.from_flat_state([(path, cut(path, one)) for path, one in nnx.to_flat_state(state)]))


def _by_rows(rows: int | None, function: Callable[..., Array], x: Array, *others: Array | None) -> Array:
    """Applies a function to a batch, `rows` rows at a time; to all of them if None."""
    if rows is None or rows == len(x):
        return function(x, *others)
    parts = jax.tree.map(lambda array: array.reshape(-1, rows, *array.shape[1:]), (x, *others))
    return jax.lax.map(lambda part: function(*part), parts).reshape(x.shape)


def _as_bfloat16(array: Array) -> Array:
    """Restores bfloat16 parameters that `embedding.encoder` stores as uint16, for one layer."""
    return jax.lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def _is_saved(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Returns whether a value is saved for the backward pass: all but gathered weights, which would be a second copy."""
    return primitive.name != "sharding_constraint"
