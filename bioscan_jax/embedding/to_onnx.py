"""Writes an encoder as an ONNX graph, with a runner that needs no JAX."""

import json
import logging
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.model_card import write_facts
from bioscan_jax.embedding import run_onnx
from bioscan_jax.embedding.step import can_count_tokens
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.model.lora import merge_adapters
from bioscan_jax.model.pooling import pool
from bioscan_jax.model.projection import unit
from bioscan_jax.output import whole_directory

if TYPE_CHECKING:
    from bioscan_jax.embedding.encoder import Encoder

GRAPH_FILE, SETTINGS_FILE = "model.onnx", "onnx.json"
_MOST_BYTES = 2**31 - 2**24
"""An ONNX file is one protocol buffer, which holds less than 2 GiB; some is left for the graph itself."""


def write_onnx(
    directory: Path, encoder: "Encoder", provenance: Provenance, facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Writes an encoder with its settings and projection as `model.onnx`, and what turns DNA into its input.

    The graph maps token ids, int32 [sequences, views, tokens] with <pad> where there is none, to float32 vectors of
    length 1. All three sizes are free. `run_onnx.py` beside it makes the ids, with numpy and onnxruntime alone.

    Args:
        directory: Created, complete or not at all.
        encoder: In float32; its settings are fixed in the graph.
        provenance: Of its weights.
        facts: Further entries of `bioscan_jax_export.json`; plain JSON values.

    Raises:
        InputError: jax2onnx is not installed, the model is not in float32 or too large, or the directory is not empty
            or cannot be written.
    """
    try:
        to_onnx: Any = import_module("jax2onnx").to_onnx
    except ImportError as error:
        raise InputError(f"--format onnx needs jax2onnx ({error}); pip install 'bioscan_jax[onnx]'") from error
    embed = encoder.settings
    encoding = encoder.encoding(embed, "sequence")
    state = nnx.state(encoder.loaded.model)
    if encoder.loaded.model.word_embeddings.dtype != jnp.float32:
        raise InputError("--format onnx: the graph is in float32; load the model with --model.dtype float32")
    if (size := sum(array.nbytes for array in jax.tree.leaves(state))) > _MOST_BYTES:
        raise InputError(
            f"--format onnx: {encoder.provenance.model} has {size / 2**30:.1f} GiB of weights, an ONNX file holds less "
            "than 2 GiB; take a smaller model"
        )
    settings = {
        "format": "bioscan_jax onnx 1",
        "pooling": embed.pooling,
        "layer": encoder.config.resolve_layer(embed.layer),
        "strand": embed.strand,
        "phases": embed.phases,
        "max_tokens": encoding.max_tokens,
        "overlong": encoding.overlong,
        "dimension": encoder.dimension,
        # The mean over all tokens, wherever they stand: then one row, which needs less padding, says the same.
        "one_row": can_count_tokens(encoder.config, embed),
    }
    with whole_directory(directory) as temporary:
        shape: Any = jax.ShapeDtypeStruct(("sequences", "views", "tokens"), jnp.int32)
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it warns of each intermediate value whose type it does not store
        try:
            to_onnx(_vectors_of(encoder), [shape], return_mode="file", output_path=str(temporary / GRAPH_FILE))
        except NotImplementedError as error:
            raise InputError(
                f"--format onnx: this jax2onnx cannot carry {provenance.model} ({one_line(error)}); install the versions "
                "that bioscan_jax's constraints.txt names"
            ) from error
        finally:
            logging.disable(before)
        for file in temporary.iterdir():
            file.chmod(0o644)  # jax2onnx lets nobody else read the weights
        (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        (temporary / "vocab.txt").write_text(encoder.vocabulary.text())
        shutil.copyfile(run_onnx.__file__, temporary / "run_onnx.py")
        write_facts(temporary, "onnx", provenance, {**facts, "settings": settings})


def _vectors_of(encoder: "Encoder") -> Any:
    """Returns the function from the token ids of each sequence's views to its vector."""
    trunk = nnx.merge(*nnx.split(encoder.loaded.model))
    merge_adapters(trunk)
    trunk.attention = "dense"
    embed, projection, pad = encoder.settings, encoder.projection, encoder.vocabulary.pad_id

    def vectors(ids: Int[Array, "b v s"]) -> Float[Array, "b d"]:
        sequences, views, tokens = ids.shape
        rows = ids.reshape(sequences * views, tokens)
        pooled = pool(trunk.hidden_state(rows, layer=embed.layer), rows, embed.pooling, pad)
        counts = jnp.sum(rows != pad, axis=1, dtype=jnp.float32)[:, None]
        weights = counts - (embed.pooling == "mean_no_cls")
        # A view of padding alone has no states.
        weighted = jnp.where(counts > 0, pooled * weights, 0.0).reshape(sequences, views, -1)
        total = jnp.where(counts > 0, weights, 0.0).reshape(sequences, views, 1)
        averaged = jnp.sum(weighted, axis=1) / jnp.sum(total, axis=1)
        return unit(averaged) if projection is None else projection(averaged)

    return vectors
