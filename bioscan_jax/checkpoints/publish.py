"""A model as a Hugging Face checkpoint, its adapters merged in, under the names of the published ones."""

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
from bioscan_jax.checkpoints.converted import Provenance, is_converted
from bioscan_jax.checkpoints.facts import write_facts
from bioscan_jax.checkpoints.head_files import Heads, write_heads
from bioscan_jax.checkpoints.keys import published_names
from bioscan_jax.checkpoints.readers import list_tensors, read_rows
from bioscan_jax.checkpoints.writers import MAX_SHARD_BYTES, PendingTensor, write_weights
from bioscan_jax.model.lora import merge_adapters
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.output import whole_directory

_CONTACT_HEAD = "esm.contact_head.regression"
_ZEROS = """\
The base checkpoint was not at hand as published files, so `contact_head`, which no forward pass of this library reads,
is zero here."""


def write_merged(
    directory: Path,
    model: NucleotideTransformer,
    vocabulary: Vocabulary,
    *,
    provenance: Provenance,
    base: Path | None,
    heads: Heads | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that `--model.checkpoint` takes, and transformers if it is a v1 model.

    Kernels are merged in float32 and rounded to the dtype of the model, which is the dtype of the files: load the model
    in float32 for a merged checkpoint that equals its adapter. The model itself is not changed; beside it, memory
    holds one layer while it is merged and written.

    Args:
        directory: Is made, whole or not at all.
        model: With its language-model head, with or without adapters; its arrays must be addressable from this process.
        vocabulary: Of the model.
        provenance: Of the weights it is made from.
        base: Directory of the published files it is made from. What they hold beside the parameters of the forward
            pass (contact head, buffers) is copied, so that the keys are those of the base. None where there are no such
            files; then the contact head, which `EsmForMaskedLM` asks for, is zero.
        heads: What was trained on its vectors.
        facts: Anything else worth keeping in `bioscan_jax_export.json`; plain JSON values.
        max_shard_bytes: Above it the weights are split over several files.

    Raises:
        InputError: The directory is not empty, or cannot be written; the base cannot be read.
        ValueError: The model has no language-model head, or the heads do not fit their label space.
    """
    if model.lm_head is None:
        raise ValueError("a published checkpoint has a language-model head; load the model with lm_head=True")
    transformer = model.config
    tensors = list(_parameters(model))
    copied = [] if base is None or is_converted(base) else list(_copied(base, tensors))
    complete = {tensor.name for tensor in copied} >= {f"{_CONTACT_HEAD}.weight", f"{_CONTACT_HEAD}.bias"}
    if not complete:
        of_head = {"weight": (1, transformer.num_hidden_layers * transformer.num_attention_heads), "bias": (1,)}
        dtype = tensors[0].dtype
        copied = [tensor for tensor in copied if not tensor.name.startswith(_CONTACT_HEAD)]
        copied += [PendingTensor.of(f"{_CONTACT_HEAD}.{k}", np.zeros(shape, dtype)) for k, shape in of_head.items()]
    raw = json.loads(transformer.to_json()) | {"dtype": model.word_embeddings.dtype.name}
    with whole_directory(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        (temporary / "vocab.txt").write_text(vocabulary.text())
        (temporary / "tokenizer_config.json").write_text(_tokenizer_config(transformer.max_tokens))
        write_weights(temporary, [*tensors, *copied], max_shard_bytes)
        if heads is not None:
            write_heads(temporary, heads)
        note = "" if complete else _ZEROS
        write_facts(temporary, "merged", provenance, facts, heads=heads, note=note)


def _parameters(model: NucleotideTransformer) -> Iterator[PendingTensor]:
    """Every published tensor of the model's own parameters, layer after layer."""
    transformer = model.config
    dtype = np.dtype(model.word_embeddings.dtype)
    rows = published_names(transformer, lm_head=True)
    graph, state = nnx.split(model)
    whole = dict(nnx.to_flat_state(state))
    shapes = {tuple(p for p in path if p != "base"): v.get_value().shape for path, v in whole.items()}

    @jax.jit
    def merged(state: nnx.State, i: Int32[Array, ""]) -> dict[str, Array]:
        """The parameters of layer `i`, its adapters merged, by dotted path."""
        sliced = [
            (path, variable.replace(jax.lax.dynamic_slice_in_dim(variable.get_value(), i, 1)))
            for path, variable in nnx.to_flat_state(state)
            if path[0] == "layers"
        ]
        rest = [(path, variable) for path, variable in nnx.to_flat_state(state) if path[0] != "layers"]
        one = nnx.merge(graph, nnx.from_flat_state(sliced + rest))
        merge_adapters(one)
        flat = nnx.to_flat_state(nnx.state(one))
        return {".".join(map(str, path)): variable.get_value()[0] for path, variable in flat if path[0] == "layers"}

    latest: dict[int, dict[str, Array]] = {}

    def read(path: tuple, i: int | None, transposed: bool, shape: tuple[int, ...]) -> np.ndarray:
        if i is not None and i not in latest:
            latest.clear()
            latest[i] = merged(state, np.int32(i))
        value = whole[path].get_value() if i is None else latest[i][".".join(map(str, path))]
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
    """The tensors of the base that the forward pass does not read."""
    ours = {tensor.name: tensor for tensor in tensors}
    for name, tensor in sorted(list_tensors(base).items()):
        if name == "lm_head.decoder.bias":  # the same as lm_head.bias, under its other name
            yield dataclasses.replace(ours["lm_head.bias"], name=name)
        elif name not in ours:
            yield PendingTensor(name, tensor.dtype, tensor.shape, functools.partial(read_rows, tensor))


def _tokenizer_config(max_tokens: int) -> str:
    """Without it transformers appends <eos>, which the models were not trained with and v1 has no embedding for."""
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "mask", "pad", "unk")}
    parsed = {"tokenizer_class": "EsmTokenizer", "model_max_length": max_tokens, "eos_token": None, **special}
    return json.dumps(parsed, indent=2, sort_keys=True) + "\n"
