"""LoRA: low-rank adapters around the linear layers of a frozen transformer (Hu et al. 2021, arXiv:2106.09685)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bioscan_jax import config
from bioscan_jax.errors import InputError
from bioscan_jax.model.layers import Linear, RowKeys
from bioscan_jax.model.transformer import NucleotideTransformer

TARGETS: dict[str, tuple[str, str]] = {
    "query": ("attention", "query"),
    "key": ("attention", "key"),
    "value": ("attention", "value"),
    "attention_output": ("attention", "output"),
    "feed_forward_in": ("feed_forward", "up"),
    "feed_forward_out": ("feed_forward", "down"),
}
"""Names of the layers that can have an adapter, and their attributes in `model.layers`."""

ALL_LINEAR = "all_linear"


class LoRALinear(nnx.Module):
    """`base(x) + (dropout(x) @ a @ b) * alpha / rank`, stacked over layers like its base; a and b are float32.

    The products with a and b have the precision of the model's other products: all bits of float32 in a float32 model.
    In a bfloat16 model it is JAX's default for float32, which is one bfloat16 pass on a TPU, TF32 on an NVIDIA GPU, and
    float32 on a CPU; sums are float32 everywhere.
    """

    def __init__(self, base: Linear, *, rank: int, alpha: float, dropout: float, rngs: nnx.Rngs):
        layers, inputs, *outputs = base.kernel[...].shape
        axes = base.kernel.get_metadata()["logical_axes"]
        bound = 1.0 / math.sqrt(inputs)
        draw = jax.random.uniform(rngs.params(), (layers, inputs, rank), jnp.float32, -bound, bound)
        self.base = base
        self.a = nnx.LoRAParam(draw, logical_axes=(axes[0], None))
        self.b = nnx.LoRAParam(jnp.zeros((layers, rank, *outputs), jnp.float32), logical_axes=(None, *axes[1:]))
        self.scaling, self.dropout = alpha / rank, dropout

    def __call__(self, x: Float[Array, "b s d"], keys: RowKeys | None = None) -> Float[Array, "b s ..."]:
        """Applies the base layer and adds the adapter, summed in float32; no dropout without `keys`."""
        y = self.base(x)
        x = x.astype(jnp.float32)
        if keys is not None and self.dropout > 0.0:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.dropout, x.shape[1:]))(keys)
            x = jnp.where(kept, x / (1.0 - self.dropout), 0.0)
        low = jax.lax.dot_general(x, self.a[...], (((2,), (0,)), ((), ())))
        return y + self.scaling * jax.lax.dot_general(low, self.b[...], (((2,), (0,)), ((), ())))


def resolve_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Returns target names in the order of `TARGETS`, with `all_linear` expanded.

    Raises:
        InputError: A name is unknown, or `names` is empty.
    """
    for name in names:
        if name not in TARGETS and name != ALL_LINEAR:
            raise InputError(f"--lora.targets {name!r} is unknown; pass some of {', '.join(TARGETS)} or {ALL_LINEAR}")
    chosen = tuple(name for name in TARGETS if name in names or ALL_LINEAR in names)
    if not chosen:
        raise InputError("--lora.targets names no layer; pass at least one")
    return chosen


def add_adapters(model: NucleotideTransformer, lora: config.LoRAConfig, rngs: nnx.Rngs) -> None:
    """Puts adapters around the targets of `model`, in place; b is zero, so the outputs do not change.

    Raises:
        InputError: A target is unknown, or already has an adapter; or the model has no layers.
    """
    if model.layers is None:
        raise InputError("this model has no layers to adapt, only embeddings; pass another --model.checkpoint")
    for name in resolve_targets(lora.targets):
        parent, attribute = TARGETS[name]
        module = getattr(model.layers, parent)
        base = getattr(module, attribute)
        if not isinstance(base, Linear):
            raise InputError(f"--lora.targets {name!r} already has an adapter; load the model without --model.adapter")
        adapted = LoRALinear(base, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, rngs=rngs)
        setattr(module, attribute, adapted)


def merge_adapters(model: NucleotideTransformer) -> None:
    """Adds each adapter to its base kernel, in float32 rounded to the base's dtype, and removes it, in place."""
    if model.layers is None:
        return
    for parent, attribute in TARGETS.values():
        module = getattr(model.layers, parent)
        layer = getattr(module, attribute)
        if isinstance(layer, LoRALinear):
            kernel = layer.base.kernel[...]
            change = jnp.einsum("lir,lr...->li...", layer.a[...], layer.b[...], precision="highest")
            layer.base.kernel[...] = (kernel.astype(jnp.float32) + layer.scaling * change).astype(kernel.dtype)
            setattr(module, attribute, layer.base)
