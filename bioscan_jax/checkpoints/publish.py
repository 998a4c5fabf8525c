"""Writes a model as a Hugging Face checkpoint with the published parameter names, its adapters merged in."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.head_files import Heads, write_heads
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import list_published, published_names
from bioscan_jax.checkpoints.model_card import write_facts
from bioscan_jax.checkpoints.orbax import is_converted
from bioscan_jax.checkpoints.projection_files import write_projection
from bioscan_jax.checkpoints.readers import read_rows, sha256_of, weight_files
from bioscan_jax.checkpoints.writers import MAX_SHARD_BYTES, PendingTensor, write_weights
from bioscan_jax.model.classifier import dotted
from bioscan_jax.model.lora import merge_adapters
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.output import whole_directory

_CONTACT_HEAD = "esm.contact_head.regression"
_ZEROS = """\
The published files of the base checkpoint were not available, so `contact_head`, which no forward pass of this library
uses, is zero here."""


def write_merged(
    directory: Path,
    model: NucleotideTransformer,
    vocabulary: Vocabulary,
    *,
    provenance: Provenance,
    base: Path | None,
    heads: Heads | None = None,
    projection: Projection | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that `--model.checkpoint` accepts, and transformers as well for a v1 model.

    Kernels are merged in float32 and rounded to the dtype of the model, which is the dtype of the files: load the model
    in float32 for a merged checkpoint that equals the adapted model. The model is not changed; one layer at a time is
    merged in memory and written.

    Args:
        directory: Created, complete or not at all.
        model: With its language-model head (where it has layers), with or without adapters; its arrays must be addressable from this process.
        vocabulary: Of the model.
        provenance: Of the base weights.
        base: Directory of the published base files. Their tensors that the forward pass does not use (contact head,
            buffers) are copied, so that the keys equal those of the base. None if there are no such files; then the
            contact head, which `EsmForMaskedLM` requires, is zero.
        heads: Taxonomic heads trained on its vectors.
        projection: Fitted on its vectors; written as one of the new files' weights.
        facts: Further entries of `bioscan_jax_export.json`; plain JSON values.
        max_shard_bytes: Larger weights are split into several files.

    Raises:
        InputError: The directory is not empty, or cannot be written; the base cannot be read.
        ValueError: The model has no language-model head, or the heads do not match their label space.
    """
    transformer = model.config
    if model.lm_head is None and transformer.num_hidden_layers:
        raise ValueError("a published checkpoint needs a language-model head; load the model with lm_head=True")
    tensors = list(_parameters(model))
    copied = [] if base is None or is_converted(base) else list(_copied(base, tensors))
    complete = not transformer.num_hidden_layers or {tensor.name for tensor in copied} >= {
        f"{_CONTACT_HEAD}.weight",
        f"{_CONTACT_HEAD}.bias",
    }
    if not complete:
        shapes = {"weight": (1, transformer.num_hidden_layers * transformer.num_attention_heads), "bias": (1,)}
        dtype = tensors[0].dtype
        copied = [tensor for tensor in copied if not tensor.name.startswith(_CONTACT_HEAD)]
        copied += [PendingTensor.from_array(f"{_CONTACT_HEAD}.{k}", np.zeros(v, dtype)) for k, v in shapes.items()]
    raw = json.loads(transformer.to_json()) | {"dtype": model.word_embeddings.dtype.name}
    with whole_directory(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        (temporary / "vocab.txt").write_text(vocabulary.text())
        (temporary / "tokenizer_config.json").write_text(_tokenizer_config(transformer.max_tokens))
        write_weights(temporary, [*tensors, *copied], max_shard_bytes)
        if heads is not None:
            write_heads(temporary, heads)
        if projection is not None:
            own = {"weights_sha256": sha256_of(weight_files(temporary)), "adapter_sha256": None}
            inputs = dataclasses.replace(projection.inputs, **own)
            write_projection(temporary, dataclasses.replace(projection, inputs=inputs))
        note = "" if complete else _ZEROS
        write_facts(temporary, "merged", provenance, facts, heads=heads, note=note)


def _parameters(model: NucleotideTransformer) -> Iterator[PendingTensor]:
    """Yields the published tensors of the model's parameters, layer by layer."""
    transformer = model.config
    dtype = np.dtype(model.word_embeddings.dtype)
    rows = published_names(transformer, lm_head=True)  # without layers there is no head
    graph, state = nnx.split(model)
    parameters = dict(nnx.to_flat_state(state))
    shapes = {tuple(p for p in path if p != "base"): v.get_value().shape for path, v in parameters.items()}

    @jax.jit
    def merge_layer(state: nnx.State, i: Int32[Array, ""]) -> dict[str, Array]:
        """Returns the parameters of layer `i` by dotted path, its adapters merged."""
        sliced = [
            (path, variable.replace(jax.lax.dynamic_slice_in_dim(variable.get_value(), i, 1)))
            for path, variable in nnx.to_flat_state(state)
            if path[0] == "layers"
        ]
        rest = [(path, variable) for path, variable in nnx.to_flat_state(state) if path[0] != "layers"]
        one = nnx.merge(graph, nnx.from_flat_state(sliced + rest))
        merge_adapters(one)
        flat = nnx.to_flat_state(nnx.state(one))
        return {dotted(path): variable.get_value()[0] for path, variable in flat if path[0] == "layers"}

    latest: dict[int, dict[str, Array]] = {}

    def read(path: tuple, i: int | None, transposed: bool, shape: tuple[int, ...]) -> np.ndarray:
        if i is not None and i not in latest:
            latest.clear()
            latest[i] = merge_layer(state, np.int32(i))
        value = parameters[path].get_value() if i is None else latest[i][dotted(path)]
        array = np.asarray(value)
        return array.reshape(array.shape[0], -1).T if transposed else array.reshape(shape)

    for i in range(-1, transformer.num_hidden_layers):
        for row in rows:
            stacked = row.path[0] == "layers"
            if stacked != (i >= 0):
                continue
            shape = shapes[row.path][1:] if stacked else shapes[row.path]
            if row.transposed:
                shape = (math.prod(shape[1:]), shape[0])
            get = functools.partial(read, row.path, i if stacked else None, row.transposed, shape)
            yield PendingTensor(row.name.format(i), dtype, shape, get)


def _copied(base: Path, tensors: Sequence[PendingTensor]) -> Iterator[PendingTensor]:
    """Yields the tensors of the base that the forward pass does not use."""
    ours = {tensor.name: tensor for tensor in tensors}
    for name, tensor in sorted(list_published(base).items()):
        if name == "lm_head.decoder.bias":  # another name of lm_head.bias
            yield dataclasses.replace(ours["lm_head.bias"], name=name)
        elif name not in ours:
            yield PendingTensor(name, tensor.dtype, tensor.shape, functools.partial(read_rows, tensor))


def _tokenizer_config(max_tokens: int) -> str:
    """Returns a tokenizer config without <eos>, which the models were not trained with and v1 has no embedding for."""
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "mask", "pad", "unk")}
    parsed = {"tokenizer_class": "EsmTokenizer", "model_max_length": max_tokens, "eos_token": None, **special}
    return json.dumps(parsed, indent=2, sort_keys=True) + "\n"
