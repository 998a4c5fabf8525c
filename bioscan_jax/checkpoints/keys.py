"""Maps published parameter names to ours, and loads checkpoint files strictly, tensor by tensor, onto the mesh."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from bioscan_jax.checkpoints.readers import StoredTensor, list_tensors, read_rows
from bioscan_jax.devices.sharding import Layout, parameter_axes, stored_shardings
from bioscan_jax.errors import InputError, logger, shown
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.transformer import NucleotideTransformer

CHUNK_BYTES = 1 << 20
"""Tensors are read, transposed and cast in pieces of this size, which fit a core's cache."""
PARALLEL_LAYERS = 4
"""Layers read at the same time where they are read straight into the stacked parameter."""


@dataclass(frozen=True)
class PublishedParameter:
    """One of our parameters and its name in a Hugging Face checkpoint."""

    path: tuple
    name: str
    """With `{}` for the layer number if the parameter is stacked over layers."""

    @property
    def transposed(self) -> bool:
        """Whether it must be transposed: PyTorch stores [out, in], a kernel is [in, out...]."""
        return self.path[-1] == "kernel"

    def names(self, layers: int) -> list[str]:
        """Returns the checkpoint's names, one per layer if stacked."""
        return [self.name.format(i) for i in range(layers)] if "{}" in self.name else [self.name]


def _linear(path: str, name: str, bias: bool = True) -> list[PublishedParameter]:
    parts = tuple(path.split("."))
    rows = [PublishedParameter((*parts, "kernel"), f"{name}.weight")]
    return rows + [PublishedParameter((*parts, "bias"), f"{name}.bias")] * bias


def _norm(path: str, name: str) -> list[PublishedParameter]:
    parts = tuple(path.split("."))
    return [
        PublishedParameter((*parts, "scale"), f"{name}.weight"),
        PublishedParameter((*parts, "bias"), f"{name}.bias"),
    ]


def published_names(config: TransformerConfig, *, lm_head: bool) -> list[PublishedParameter]:
    """Returns the key table of a model: every parameter once."""
    layer = "esm.encoder.layer.{}"
    rows = [PublishedParameter(("word_embeddings",), "esm.embeddings.word_embeddings.weight")]
    if config.position_embedding_type == "absolute":
        rows.append(PublishedParameter(("position_embeddings",), "esm.embeddings.position_embeddings.weight"))
    if not config.num_hidden_layers:
        return rows
    rows += _norm("layers.attention_norm", f"{layer}.attention.LayerNorm")
    for part in ("query", "key", "value"):
        rows += _linear(f"layers.attention.{part}", f"{layer}.attention.self.{part}")
    rows += _linear("layers.attention.output", f"{layer}.attention.output.dense")
    rows += _norm("layers.feed_forward_norm", f"{layer}.LayerNorm")
    rows += _linear("layers.feed_forward.up", f"{layer}.intermediate.dense", config.feed_forward_bias)
    rows += _linear("layers.feed_forward.down", f"{layer}.output.dense", config.feed_forward_bias)
    rows += _norm("final_norm", "esm.encoder.emb_layer_norm_after")
    if lm_head:
        rows += _linear("lm_head.dense", "lm_head.dense")
        rows += _norm("lm_head.norm", "lm_head.layer_norm")
        rows += [
            PublishedParameter(("lm_head", "decoder", "kernel"), "lm_head.decoder.weight"),
            PublishedParameter(("lm_head", "decoder", "bias"), "lm_head.bias"),
        ]
    return rows


def unused_names(config: TransformerConfig) -> set[str]:
    """Returns the tensor names of published checkpoints that the forward pass does not use."""
    names = {
        "esm.embeddings.position_ids",
        "esm.contact_head.regression.weight",
        "esm.contact_head.regression.bias",
        "lm_head.decoder.bias",
    }
    if config.position_embedding_type == "rotary":
        names.add("esm.embeddings.position_embeddings.weight")
        names.add("esm.rotary_embeddings.inv_freq")
        for i in range(config.num_hidden_layers):
            names.add(f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq")
    return names


_NOT_FOR_VECTORS = ("classifier", "score", "qa_outputs", "esm.pooler", "esm.contact_head")
"""Modules of transformers' ESM classes around the trunk, whose tensors no vector needs."""
_BARE_TRUNK = ("embeddings.", "encoder.", "pooler.", "contact_head.", "rotary_embeddings.")
"""Starts of the names in a checkpoint of `EsmModel`, where the others have `esm.` before them."""
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
"""Names of a LayerNorm's parameters in checkpoints that began in TensorFlow."""


def unneeded_module(name: str) -> str | None:
    """Returns the module around the trunk that a tensor belongs to, by its published name; None for the trunk's own.

    Example:
        >>> unneeded_module("esm.contact_head.regression.weight"), unneeded_module("lm_head.bias")
        ('esm.contact_head', 'lm_head')
    """
    return next((module for module in (*_NOT_FOR_VECTORS, "lm_head") if name.startswith(f"{module}.")), None)


def list_published(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint as `readers.list_tensors` does, by the names that `EsmForMaskedLM` gives them.

    Raises:
        InputError: As for `list_tensors`, or two tensors come to the same name.
    """
    stored = list_tensors(directory)
    bare = not any(name.startswith("esm.") for name in stored)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        published = f"esm.{name}" if bare and name.startswith(_BARE_TRUNK) else name
        parent, _, last = published.rpartition(".")
        if last in _OLD_NAMES and "norm" in parent.rpartition(".")[2].lower():
            published = f"{parent}.{_OLD_NAMES[last]}"
        if published in found:
            raise InputError(
                f"{directory}: {shown(found[published].name)} and {shown(name)} are the same parameter; save the model again"
            )
        found[published] = tensor
    return found


def has_lm_head(directory: Path) -> bool:
    """Returns whether a checkpoint has a tensor of the masked-language-model head; raises as `list_published` does."""
    return any(name.startswith("lm_head.") for name in list_published(directory))


def abstract_model(config: TransformerConfig, dtype: DTypeLike, *, lm_head: bool) -> NucleotideTransformer:
    """Builds the model with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: NucleotideTransformer(config, rngs=nnx.Rngs(0), dtype=dtype, lm_head=lm_head))


def random_model(
    config: TransformerConfig, dtype: DTypeLike, layout: Layout, *, seed: int, lm_head: bool = False
) -> NucleotideTransformer:
    """Builds a model with seeded random parameters, made on their devices."""
    graph, state = nnx.split(abstract_model(config, dtype, lm_head=lm_head))
    shardings = stored_shardings(state, layout)

    def init() -> nnx.State:
        return nnx.state(NucleotideTransformer(config, rngs=nnx.Rngs(seed), dtype=dtype, lm_head=lm_head))

    placed = nnx.from_flat_state([(path, v.replace(shardings[path])) for path, v in nnx.to_flat_state(state)])
    return nnx.merge(graph, jax.jit(init, out_shardings=placed)())


def load_model(
    directory: Path,
    config: TransformerConfig,
    dtype: DTypeLike,
    layout: Layout,
    *,
    lm_head: bool = False,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> NucleotideTransformer:
    """Reads a Hugging Face checkpoint onto the mesh.

    Host memory holds one tensor of one layer in `dtype` and a chunk of its file, whatever the model's size; if the only
    device is the CPU, it holds the parameters and chunks.

    Args:
        directory: Holds safetensors or PyTorch files; see `readers.list_tensors`.
        config: The architecture that the files must match.
        dtype: Of the parameters on the devices.
        layout: Placement of the parameters on the devices.
        lm_head: Also load the masked-language-model head.
        on_bytes: Called with the number of file bytes just read.

    Raises:
        InputError: A tensor is missing, unexpected, or has another shape; there is no head and `lm_head` asks for it.
    """
    graph, state = nnx.split(abstract_model(config, dtype, lm_head=lm_head))
    tensors = list_published(directory)
    table = {row.path: row for row in published_names(config, lm_head=lm_head)}
    shapes = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    assert table.keys() == shapes.keys(), table.keys() ^ shapes.keys()
    _check_names(directory, config, tensors, lm_head=lm_head)
    shardings = stored_shardings(state, layout)
    loaded = []
    for path, variable in nnx.to_flat_state(state):
        row, shape, sharding = table[path], shapes[path], shardings[path]
        stored = [tensors[name] for name in row.names(config.num_hidden_layers)]
        if path[0] != "layers":
            array = shard_array(_read(stored[0], shape, row.transposed, dtype, on_bytes), sharding)
        elif layout.is_single_cpu:
            array = shard_array(_read_layers(stored, shape, row.transposed, dtype, on_bytes), sharding)
        else:
            axes = parameter_axes(path, variable)[1:]
            pieces = (
                shard_array(_read(t, shape[1:], row.transposed, dtype, on_bytes), layout.stored(axes)) for t in stored
            )
            array = _stack(pieces, shape, dtype, sharding)
        loaded.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _check_names(
    directory: Path, config: TransformerConfig, tensors: dict[str, StoredTensor], *, lm_head: bool
) -> None:
    """Raises InputError unless the tensors are those of the trunk, and of the whole head if there is one or must be."""
    every = [name for row in published_names(config, lm_head=True) for name in row.names(config.num_hidden_layers)]
    of_head = {name for name in every if name.startswith("lm_head.")}
    without_head = not of_head & tensors.keys()
    missing = [name for name in every if name not in tensors and not (without_head and name in of_head)]
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} tensor(s) missing, first {missing[0]!r}; "
            "the weights do not belong to this config.json, or the download is incomplete"
        )
    if without_head and lm_head:
        raise InputError(
            f"{directory} has no masked-language-model head (lm_head), which this needs: it was saved from a model "
            "without one; pass the checkpoint it was made from, or what needs vectors only"
        )
    spare = tensors.keys() - set(every) - unused_names(config)
    left_out = sorted({module for name in spare if (module := unneeded_module(name)) not in (None, "lm_head")})
    unexpected = sorted(name for name in spare if unneeded_module(name) not in left_out)
    if unexpected:
        raise InputError(
            f"{directory}: {len(unexpected)} unexpected tensor(s), first {shown(unexpected[0])}; "
            "the weights do not belong to this config.json"
        )
    if left_out:
        logger.warning("%s: %s left out, which vectors do not need", directory, ", ".join(left_out))


def _read(
    tensor: StoredTensor, shape: tuple[int, ...], transposed: bool, dtype: DTypeLike, on_bytes: Callable[[int], object]
) -> np.ndarray:
    """Reads one tensor into a host array of our shape and dtype."""
    target = _aligned(shape, jnp.dtype(dtype))
    for size in _fill(target, tensor, transposed):
        on_bytes(size)
    return target


def _read_layers(
    tensors: list[StoredTensor],
    shape: tuple[int, ...],
    transposed: bool,
    dtype: DTypeLike,
    on_bytes: Callable[[int], object],
) -> np.ndarray:
    """Reads one tensor per layer into one stacked host array, several layers at a time."""
    target = _aligned(shape, jnp.dtype(dtype))

    def fill(layer: int) -> int:
        return sum(_fill(target[layer], tensors[layer], transposed))

    with ThreadPoolExecutor(min(PARALLEL_LAYERS, os.cpu_count() or 1), "weights") as pool:
        for size in pool.map(fill, range(len(tensors))):
            on_bytes(size)
    return target


def _fill(target: np.ndarray, tensor: StoredTensor, transposed: bool) -> Iterator[int]:
    """Reads a tensor into an array of our shape, in chunks of rows, and yields the bytes of each chunk.

    Raises:
        InputError: It has another shape, or is not floating point.
    """
    shape = target.shape
    published = (math.prod(shape[1:]), shape[0]) if transposed else shape
    if tensor.shape != published:
        raise InputError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json needs {list(published)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{tensor.file}: {tensor.name} is {tensor.dtype}, not floating point")
    view = target.reshape(published[::-1]).T if transposed else target
    row_bytes = math.prod(published[1:]) * tensor.dtype.itemsize
    step = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, published[0], step):
        rows = slice(start, min(start + step, published[0]))
        view[rows] = read_rows(tensor, rows)
        yield (rows.stop - rows.start) * row_bytes


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Makes an uninitialised array whose alignment lets JAX's CPU device use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def shard_array(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Copies to each device of this process its part of an array that every process holds."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _stack(
    pieces: Iterator[jax.Array], shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Copies the layers one by one into a stacked array on the devices.

    Waits for each copy and frees the layer before reading the next, so that host memory holds only one.
    """
    whole = _zeros(shape, jnp.dtype(dtype), sharding)
    for i, piece in enumerate(pieces):
        whole = jax.block_until_ready(_write(whole, piece, np.int32(i), sharding))
        del piece
    return whole


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, i: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(whole, piece, i, 0), sharding)
