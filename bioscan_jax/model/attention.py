"""Attention by length and device: dense where rows are short, a flash kernel where logits would fill the memory.

Dense attention writes heads x tokens x tokens logits for each row to memory; splash (TPU, Pallas) and cuDNN's flash
attention (NVIDIA) never do. All are the same function of the real tokens, and finite on padding. In float32 they agree
to rounding. In bfloat16 dense rounds probabilities after they are normalised and splash before, if at all: a
difference of bfloat16's own size, as between two kinds of devices, so that neither decides what a table is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bioscan_jax.devices.sharding import Layout
from bioscan_jax.errors import InputError

Kind: TypeAlias = Literal["dense", "splash", "cudnn", "interpreted"]
"""How it is computed; interpreted is splash on any device, step by step, to be compared with dense."""
Choice: TypeAlias = Literal["auto", "dense", "splash", "cudnn", "interpreted"]
"""What can be asked for; a config cannot ask for the last."""
Attend: TypeAlias = Callable[
    [Float[Array, "b s h hd"], Float[Array, "b s h hd"], Float[Array, "b s h hd"], Bool[Array, "b s"]],
    Float[Array, "b s h hd"],
]
"""Queries, keys, values and where tokens are real, to what is attended; all in the dtype of keys and values."""

LEAST_TOKENS = 512
"""Rows from which `auto` leaves dense attention.

From here on splash moves fewer bytes to and from memory than dense and needs less of it, whatever the filling of its
blocks: so says libtpu's compiler (0.0.42) for v4, v5e and v6e and the head sizes 32, 64 and 128. Of 16,384 tokens,
20 heads of 128, on v5e, MiB moved (temporaries), dense against splash: 128 tokens a row 1283 (160) against 1475 (265);
512 tokens 2243 (640) against 1475 (265); 1000 tokens 3612 (1330) against 2087 (249). No time was measured on a chip.
"""
AUTO: tuple[tuple[Kind, tuple[str, ...] | None], ...] = (
    ("splash", ("TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite")),
    ("cudnn", None),
)
"""What `auto` tries from LEAST_TOKENS on, and for which `Device.device_kind`; None for any. Dense is what is left."""

_BEFORE_SPLASH = ("TPU v2", "TPU v3")  # Their compiler refuses bfloat16 in Pallas kernels.
_LANES = 128
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where attention is computed, and one layer's sizes."""

    platform: str
    """tpu, gpu or cpu."""
    device_kind: str
    capability: str | None
    """Compute capability of an NVIDIA device; None or another text elsewhere."""
    dtype: str
    """Of keys and values."""
    heads: int
    head_dim: int
    sharing: int
    """Devices that split one layer's heads."""


def site(layout: Layout | None, *, heads: int, head_dim: int, dtype: DTypeLike) -> Site:
    """Where a layer with these sizes runs; None is JAX's default device."""
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return Site(
        platform=device.platform,
        device_kind=device.device_kind,
        capability=getattr(device, "compute_capability", None),
        dtype=jnp.dtype(dtype).name,
        heads=heads,
        head_dim=head_dim,
        sharing=1 if layout is None else layout.head_devices,
    )


def choose(choice: Choice, where: Site, tokens: int) -> Kind:
    """The kind of attention for rows of so many tokens, padding included.

    Raises:
        InputError: A kind is asked for by name that cannot work there.
    """
    if choice == "auto":
        for kind, device_kinds in AUTO:
            listed = device_kinds is None or where.device_kind in device_kinds
            if tokens >= LEAST_TOKENS and listed and obstacle(kind, where) is None:
                return kind
        return "dense"
    if found := obstacle(choice, where):
        raise InputError(f"--model.attention {choice} {found}; pass auto or dense")
    return choice


def obstacle(kind: Kind, where: Site) -> str | None:
    """Why a kind cannot work there, or None."""
    if kind in ("splash", "interpreted") and where.heads % where.sharing:
        return f"cannot split {where.heads} heads over --mesh.model {where.sharing} devices"
    if kind == "splash" and (where.platform != "tpu" or where.device_kind in _BEFORE_SPLASH):
        return f"needs a TPU v4 or newer, not {where.device_kind}"
    if kind == "cudnn":
        if where.platform != "gpu" or not _is_ampere_or_newer(where.capability):
            return f"needs an NVIDIA GPU of compute capability 8.0 or newer, not {where.device_kind}"
        if where.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16, not {where.dtype}"
        if where.head_dim % 8 or where.head_dim > 128:
            return f"needs heads of a multiple of 8 features up to 128, not {where.head_dim}"
    return None


def _is_ampere_or_newer(capability: str | None) -> bool:
    major = (capability or "").partition(".")[0]
    return major.isdigit() and int(major) >= 8


def attend_by(kind: Kind, layout: Layout | None) -> Attend:
    """The function of a kind.

    Args:
        kind: As `choose` says.
        layout: Where rows and heads are; None for a single device.
    """
    if kind in ("splash", "interpreted"):
        return partial(splash, layout=layout, interpret=kind == "interpreted")
    return cudnn if kind == "cudnn" else dense


def dense(
    q: Float[Array, "b s h hd"], k: Float[Array, "b s h hd"], v: Float[Array, "b s h hd"], mask: Bool[Array, "b s"]
) -> Float[Array, "b s h hd"]:
    """Attends with all logits in memory; logits and softmax in float32."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    return jax.nn.dot_product_attention(q.astype(k.dtype), k, v, mask=mask[:, None, None, :], scale=scale)


def cudnn(
    q: Float[Array, "b s h hd"], k: Float[Array, "b s h hd"], v: Float[Array, "b s h hd"], mask: Bool[Array, "b s"]
) -> Float[Array, "b s h hd"]:
    """Attends with cuDNN's flash kernel; rows are padded on the right. Padding attends to real tokens, as in dense."""
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    scale = 1.0 / math.sqrt(q.shape[-1])
    return jax.nn.dot_product_attention(
        q.astype(k.dtype), k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def splash(
    q: Float[Array, "b s h hd"],
    k: Float[Array, "b s h hd"],
    v: Float[Array, "b s h hd"],
    mask: Bool[Array, "b s"],
    *,
    layout: Layout | None = None,
    interpret: bool = False,
) -> Float[Array, "b s h hd"]:
    """Attends block by block (Dao et al. 2022, arXiv:2205.14135), each device its own rows and heads.

    Real tokens and padding are two segments, each attending to itself; rows are filled up to whole blocks.

    Args:
        q: Queries; rounded once, after scaling, so better given in float32.
        k: Keys.
        v: Values.
        mask: True where a token is real.
        layout: Where rows and heads are; None for a single device.
        interpret: Run on any device, slowly.
    """
    tokens, head_dim = q.shape[1], q.shape[-1]
    block, whole = blocks(tokens)
    q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(k.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, whole - tokens), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = jnp.pad(mask, ((0, 0), (0, whole - tokens))).astype(jnp.int32)
    function = partial(_splash, block=block, interpret=interpret)
    if layout is not None:
        function = layout.map_rows_and_heads(function)
    return function(q, k, v, segments).transpose(0, 2, 1, 3)[:, :tokens]


def _splash(q: Array, k: Array, v: Array, segments: Array, *, block: int, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, tokens, _ = q.shape
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    every = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    attend = kernel.make_splash_mha_single_device(mask=every, block_sizes=sizes, interpret=interpret)

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return cast(Array, attend(q, k, v, kernel.SegmentIds(segments, segments)))

    return jax.vmap(row)(q, k, v, segments)


def blocks(tokens: int) -> tuple[int, int]:
    """Tokens of a block of splash, and of all blocks of a row."""
    number = -(-tokens // _BLOCK)
    block = -(-tokens // (number * _LANES)) * _LANES
    return block, number * block
