"""Attention kernels, chosen by row length and device: dense for short rows, flash kernels for long ones.

Dense attention stores heads x tokens x tokens logits per row in memory; splash (TPU, Pallas) and cuDNN's flash
attention (NVIDIA) do not. All compute the same function of the real tokens and are finite on padding. In float32 they
agree to rounding. In bfloat16, dense rounds probabilities after normalising them and splash before, if at all: a
difference of bfloat16's own precision, like that between two kinds of devices, so the kernel is not part of what
identifies a table.
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

AttentionKind: TypeAlias = Literal["dense", "splash", "cudnn", "interpreted"]
"""The kernel; interpreted is splash emulated on any device, for tests against dense."""
AttentionChoice: TypeAlias = Literal["auto", "dense", "splash", "cudnn", "interpreted"]
"""A requested kernel; a config cannot request interpreted."""
AttentionFunction: TypeAlias = Callable[
    [Float[Array, "b s h hd"], Float[Array, "b s h hd"], Float[Array, "b s h hd"], Bool[Array, "b s"]],
    Float[Array, "b s h hd"],
]
"""From queries, keys, values and the mask of real tokens to the attended values, in the dtype of keys and values."""

FLASH_MIN_TOKENS = 512
"""Row length in tokens from which `auto` prefers a flash kernel to dense attention.

From this length splash moves fewer bytes to and from memory than dense and needs less of it, however full its blocks
are, according to libtpu's compiler (0.0.42) for v4, v5e and v6e and head sizes 32, 64 and 128. For 16,384 tokens,
20 heads of 128, on v5e, MiB moved (temporaries), dense against splash: rows of 128 tokens 1283 (160) against 1475
(265); of 512 tokens 2243 (640) against 1475 (265); of 1000 tokens 3612 (1330) against 2087 (249). No time was measured
on a chip.
"""
AUTO_KINDS: tuple[tuple[AttentionKind, tuple[str, ...] | None], ...] = (
    ("splash", ("TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite")),
    ("cudnn", None),
)
"""Kernels that `auto` tries from FLASH_MIN_TOKENS, with their `Device.device_kind` (None for any); else dense."""

_BEFORE_SPLASH = ("TPU v2", "TPU v3")  # Their compiler does not support bfloat16 in Pallas kernels.
_LANES = 128
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class AttentionSetting:
    """The device and layer sizes that decide which kernels are supported."""

    platform: str
    """tpu, gpu or cpu."""
    device_kind: str
    capability: str | None
    """Compute capability of an NVIDIA device; None or another string on other devices."""
    dtype: str
    """Of keys and values."""
    heads: int
    head_dim: int
    head_devices: int
    """Number of devices over which one layer's heads are split."""


def attention_setting(layout: Layout | None, *, heads: int, head_dim: int, dtype: DTypeLike) -> AttentionSetting:
    """Returns the setting of a layer with these sizes on a layout; None is JAX's default device."""
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return AttentionSetting(
        platform=device.platform,
        device_kind=device.device_kind,
        capability=getattr(device, "compute_capability", None),
        dtype=jnp.dtype(dtype).name,
        heads=heads,
        head_dim=head_dim,
        head_devices=1 if layout is None else layout.head_devices,
    )


def choose_attention(choice: AttentionChoice, setting: AttentionSetting, tokens: int) -> AttentionKind:
    """Chooses the kernel for rows of `tokens` tokens, padding included.

    Raises:
        InputError: A kernel requested by name is not supported in this setting.
    """
    if choice == "auto":
        for kind, device_kinds in AUTO_KINDS:
            listed = device_kinds is None or setting.device_kind in device_kinds
            if tokens >= FLASH_MIN_TOKENS and listed and _unsupported_reason(kind, setting) is None:
                return kind
        return "dense"
    if reason := _unsupported_reason(choice, setting):
        raise InputError(f"--model.attention {choice} {reason}; pass auto or dense")
    return choice


def _unsupported_reason(kind: AttentionKind, setting: AttentionSetting) -> str | None:
    """Returns why a kernel is not supported in this setting, or None if it is."""
    if kind in ("splash", "interpreted") and setting.heads % setting.head_devices:
        return f"cannot split {setting.heads} heads over --mesh.model {setting.head_devices} devices"
    if kind == "splash" and (setting.platform != "tpu" or setting.device_kind in _BEFORE_SPLASH):
        return f"needs a TPU v4 or newer, not {setting.device_kind}"
    if kind == "cudnn":
        if setting.platform != "gpu" or not _is_ampere_or_newer(setting.capability):
            return f"needs an NVIDIA GPU of compute capability 8.0 or newer, not {setting.device_kind}"
        if setting.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16, not {setting.dtype}"
        if setting.head_dim % 8 or setting.head_dim > 128:
            return f"needs heads of a multiple of 8 features up to 128, not {setting.head_dim}"
    return None


def _is_ampere_or_newer(capability: str | None) -> bool:
    major = (capability or "").partition(".")[0]
    return major.isdigit() and int(major) >= 8


def attention_function(kind: AttentionKind, layout: Layout | None) -> AttentionFunction:
    """Returns the attention function of a kernel.

    Args:
        kind: As returned by `choose_attention`.
        layout: Placement of rows and heads; None for a single device.
    """
    if kind in ("splash", "interpreted"):
        return partial(splash_attention, layout=layout, interpret=kind == "interpreted")
    return cudnn_attention if kind == "cudnn" else dense_attention


def dense_attention(
    q: Float[Array, "b s h hd"], k: Float[Array, "b s h hd"], v: Float[Array, "b s h hd"], mask: Bool[Array, "b s"]
) -> Float[Array, "b s h hd"]:
    """Attends with all logits in memory; logits and softmax in float32."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    return jax.nn.dot_product_attention(q.astype(k.dtype), k, v, mask=mask[:, None, None, :], scale=scale)


def cudnn_attention(
    q: Float[Array, "b s h hd"], k: Float[Array, "b s h hd"], v: Float[Array, "b s h hd"], mask: Bool[Array, "b s"]
) -> Float[Array, "b s h hd"]:
    """Attends with cuDNN's flash kernel; rows are padded on the right. Padding attends to real tokens, as in dense."""
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    scale = 1.0 / math.sqrt(q.shape[-1])
    return jax.nn.dot_product_attention(
        q.astype(k.dtype), k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def splash_attention(
    q: Float[Array, "b s h hd"],
    k: Float[Array, "b s h hd"],
    v: Float[Array, "b s h hd"],
    mask: Bool[Array, "b s"],
    *,
    layout: Layout | None = None,
    interpret: bool = False,
) -> Float[Array, "b s h hd"]:
    """Attends block by block (Dao et al. 2022, arXiv:2205.14135); each device computes its own rows and heads.

    Real tokens and padding are two segments that attend only within themselves; rows are padded to whole blocks.

    Args:
        q: Queries; rounded once after scaling, so preferably float32.
        k: Keys.
        v: Values.
        mask: True where a token is real.
        layout: Placement of rows and heads; None for a single device.
        interpret: Emulate the kernel on any device, slowly.
    """
    tokens, head_dim = q.shape[1], q.shape[-1]
    block, padded = splash_blocks(tokens)
    q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(k.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = jnp.pad(mask, ((0, 0), (0, padded - tokens))).astype(jnp.int32)
    function = partial(_splash_kernel, block=block, interpret=interpret)
    if layout is not None:
        function = layout.map_rows_and_heads(function)
    return function(q, k, v, segments).transpose(0, 2, 1, 3)[:, :tokens]


def _splash_kernel(q: Array, k: Array, v: Array, segments: Array, *, block: int, interpret: bool) -> Array:
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
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    attend = kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return cast(Array, attend(q, k, v, kernel.SegmentIds(segments, segments)))

    return jax.vmap(row)(q, k, v, segments)


def splash_blocks(tokens: int) -> tuple[int, int]:
    """Returns the tokens in one splash block, and in all blocks of a row."""
    number = -(-tokens // _BLOCK)
    block = -(-tokens // (number * _LANES)) * _LANES
    return block, number * block
