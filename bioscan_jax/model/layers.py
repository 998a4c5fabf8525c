"""The pre-LayerNorm encoder layer of the Nucleotide Transformer.

Matrix products use the dtype of the parameters and accumulate in float32; LayerNorm, softmax and rotary positions are
computed in float32.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from bioscan_jax.devices.sharding import Axes
from bioscan_jax.model.attention import AttentionFunction, dense_attention
from bioscan_jax.model.config import TransformerConfig

RowKeys: TypeAlias = Key[Array, " b"]
"""One random key per row of the batch, so that a row's dropout does not depend on the other rows."""


class Linear(nnx.Module):
    """`x @ kernel + bias`, accumulated and returned in float32.

    The output may have several dimensions (the two halves of a gated feed-forward), so that each can be split over
    devices separately.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | tuple[int, ...],
        *,
        axes: Axes,
        bias: bool,
        config: TransformerConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (outputs,) if isinstance(outputs, int) else outputs
        init = jax.nn.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, *shape), dtype), logical_axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape, dtype), logical_axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "b s d"], keys: RowKeys | None = None) -> Float[Array, "b s ..."]:
        """Applies the layer in the kernel's dtype; `keys` is unused here, adapters around it use it for dropout."""
        kernel = self.kernel[...]
        x = x.astype(kernel.dtype)
        y = jax.lax.dot_general(x, kernel, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(jnp.float32)
        return y + bias.reshape((1, 1, *bias.shape))


class LayerNorm(nnx.Module):
    """Layer normalisation over the features, computed and returned in float32."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), dtype), logical_axes=("hidden",))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,), dtype), logical_axes=("hidden",))
        self.eps = config.layer_norm_eps

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Normalises each token."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scale, bias = (p[...].astype(jnp.float32).reshape(1, 1, -1) for p in (self.scale, self.bias))
        return centred * jax.lax.rsqrt(variance + self.eps) * scale + bias


def rotary_tables(tokens: int, head_dim: int) -> tuple[Float[Array, "s half"], Float[Array, "s half"]]:
    """Returns cosine and sine of rotary positions, base 10000, CLS at position 0 (Su et al. 2021, arXiv:2104.09864)."""
    frequency = 1.0 / (10000.0 ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    angle = jax.lax.broadcasted_iota(jnp.float32, (tokens, 1), 0) * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b s h hd"], tables: tuple[Float[Array, "s half"], Float[Array, "s half"]]
) -> Float[Array, "b s h hd"]:
    """Rotates feature i of the first half of each head together with feature i of the second half."""
    cos, sin = (t[None, :, None, :] for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention over the tokens where `mask` is True."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.hidden_size
        self.query, self.key, self.value = (
            Linear(d, d, axes=("hidden", "heads"), bias=True, config=config, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.output = Linear(d, d, axes=("heads", "hidden"), bias=True, config=config, dtype=dtype, rngs=rngs)
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"],
        rotary: tuple[Float[Array, "s half"], Float[Array, "s half"]] | None,
        keys: RowKeys | None = None,
        attend: AttentionFunction = dense_attention,
    ) -> Float[Array, "b s d"]:
        """Attends in the dtype of the parameters; logits and softmax in float32."""
        b, s, d = x.shape
        *qkv_keys, output_keys = _split_optional(keys, 4)
        q, k, v = (
            projection(x, row_keys).reshape(b, s, self.heads, self.head_dim)
            for projection, row_keys in zip((self.query, self.key, self.value), qkv_keys, strict=True)
        )
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        attended = attend(q, k.astype(self.dtype), v.astype(self.dtype), mask)
        return self.output(attended.reshape(b, s, d), output_keys)


class FeedForward(nnx.Module):
    """GELU (v1, exact erf) or SiLU-gated (v2: SiLU of the first half times the second) feed-forward."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.feed_forward_bias
        outputs, axes = ((2, f), ("hidden", None, "mlp")) if config.gated else ((f,), ("hidden", "mlp"))
        self.up = Linear(d, outputs, axes=axes, bias=bias, config=config, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, axes=("mlp", "hidden"), bias=bias, config=config, dtype=dtype, rngs=rngs)
        self.gated = config.gated

    def __call__(self, x: Float[Array, "b s d"], keys: RowKeys | None = None) -> Float[Array, "b s d"]:
        """Expands, activates in float32, projects back."""
        up_keys, down_keys = _split_optional(keys, 2)
        up = self.up(x, up_keys)
        if self.gated:
            return self.down(jax.nn.silu(up[:, :, 0]) * up[:, :, 1], down_keys)
        return self.down(jax.nn.gelu(up, approximate=False), down_keys)


class Layer(nnx.Module):
    """One encoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = LayerNorm(config, dtype=dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"],
        rotary: tuple[Float[Array, "s half"], Float[Array, "s half"]] | None,
        keys: RowKeys | None = None,
        attend: AttentionFunction = dense_attention,
    ) -> Float[Array, "b s d"]:
        """Applies the layer; sums in float32, returns the dtype of `x`; `keys` are for the adapters' dropout."""
        attention_keys, feed_forward_keys = _split_optional(keys, 2)
        attended = self.attention(self.attention_norm(x), mask, rotary, attention_keys, attend)
        x = (x.astype(jnp.float32) + attended).astype(x.dtype)
        fed = self.feed_forward(self.feed_forward_norm(x), feed_forward_keys)
        return (x.astype(jnp.float32) + fed).astype(x.dtype)


def _split_optional(keys: RowKeys | None, parts: int) -> Sequence[RowKeys | None]:
    return [None] * parts if keys is None else list(split_row_keys(keys, parts))


def split_row_keys(keys: RowKeys, parts: int) -> Key[Array, "parts b"]:
    """Splits each row's key into `parts` keys."""
    return jax.vmap(lambda key: jax.random.split(key, parts), out_axes=1)(keys)
