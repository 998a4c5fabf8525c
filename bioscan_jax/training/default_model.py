"""Trains the model in the package from labelled barcodes: a whitened count of 6-mers, with a residual network beside it.

A barcode's vector is made of how often it has each of the 2,080 6-mers, where a 6-mer and its reverse complement are
one: so both strands have the same vector. Such counts are the mean of token embeddings over the six start phases, that
is hidden state 0 of a Nucleotide Transformer without layers. `fit_metric` learns what they mean; its linear map is then
folded into the token embeddings, so that the model costs one matrix product per barcode.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from bioscan_jax import config
from bioscan_jax.barcodes.strands import reverse_words
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.projection_files import read_projection, write_projection
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.run import embed
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory, output_directory
from bioscan_jax.model.config import PRESETS, TransformerConfig
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.training.metric import MetricSummary, fit_metric

_CARD = """\
---
license: apache-2.0
tags:
- dna
- barcoding
- biology
---

# 6-mers of both strands, whitened, with a network beside

A Nucleotide Transformer without layers: token embeddings averaged over six start phases, and a projection. A barcode
and its reverse complement have the same vector.

    import bioscan_jax as bj
    vectors = bj.load("DIRECTORY_OF_THIS_FILE").encode(["ACGT..."])

{description}.
"""
COUNTED_AT = config.EmbedConfig(layer=0, phases=6, pooling="mean")
"""How the raw vectors are made."""


def train_default_model(
    data: config.DataConfig,
    output: str,
    metric: config.MetricConfig = config.MetricConfig(network=True),  # noqa: B008 - frozen
    *,
    work: str,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
    progress: bool = True,
) -> MetricSummary:
    """Trains a model like the one in the package.

    Args:
        data: Labelled barcodes.
        output: Directory or URL to make; `bioscan_jax.load(output)` loads the model.
        metric: How the projection is fitted.
        work: Directory for the 6-mer counts, their table and the fit; a stopped call continues there.
        mesh: Devices.
        progress: Show progress bars on stderr.

    Raises:
        InputError: The data have no labels or cannot be read, or `output` exists.
    """
    directory = local_directory(work, flag="work")
    if directory is None:
        raise InputError(f"--work {work}: pass a directory on this machine; --output may be a URL")
    base, fitted, table = (directory / name for name in ("counts", "projection", "table"))
    if (fitted / "projection.json").is_file():
        raise InputError(f"{fitted} exists, from an earlier run; remove it, or pass another --work")
    with output_directory(output) as goal:
        start_devices(mesh)
        if not (base / "config.json").is_file():
            write_sixmer_counts(base)
        embed(
            config.ModelConfig(checkpoint=str(base)),
            data,
            config.SinkConfig(uri=str(table)),
            COUNTED_AT,
            mesh,
            progress=progress,
        )
        summary = fit_metric(config.ReferenceConfig(uri=str(table)), str(fitted), metric, mesh=mesh, progress=progress)
        loaded = load_weights(config.ModelConfig(checkpoint=str(base)), make_layout(mesh))
        projection = read_projection(fitted)
        write_folded(goal, loaded.model, loaded.vocabulary, projection)
        (goal / "README.md").write_text(_CARD.format(description=projection.description))
    return summary


def write_sixmer_counts(directory: Path) -> None:
    """Writes a checkpoint without layers whose token embeddings count 6-mers, each with its reverse complement."""
    vocabulary = Vocabulary.published("v2")
    columns = _strand_pairs()
    transformer = dataclasses.replace(
        PRESETS["tiny-v2"], hidden_size=int(columns.max()) + 1, num_hidden_layers=0, num_attention_heads=1
    )
    table = np.zeros((transformer.vocab_size, transformer.hidden_size), np.float32)
    table[vocabulary.sixmer_ids, columns] = 1.0
    _write(directory, transformer, vocabulary, table, None)


def write_folded(directory: Path, model: NucleotideTransformer, vocabulary: Vocabulary, projection: Projection) -> None:
    """Writes a model without layers with its projection, the projection's linear map multiplied into its embeddings.

    Embeddings and projection are stored in float16, at a scale at which the embeddings have a root mean square of 1.

    Args:
        directory: Directory to make.
        model: A model without layers.
        vocabulary: Of the model.
        projection: Fitted on the model's layer 0.
    """
    table = np.asarray(model.word_embeddings.get_value(), np.float64) @ np.asarray(projection.linear, np.float64)
    scale = 1.0 / np.sqrt(np.mean(table[table.any(axis=1)] ** 2))
    networks = tuple(
        network
        if network.input_length is not None
        else dataclasses.replace(
            network,
            w1=_times(network.w1, 1 / scale),
            skip=None if network.skip is None else _times(network.skip, 1 / scale),
        )
        for network in projection.networks
    )
    mean = np.asarray(projection.mean, np.float64) @ np.asarray(projection.linear, np.float64) * scale
    folded = dataclasses.replace(projection, mean=mean.astype(np.float32), linear=None, networks=networks)
    transformer = dataclasses.replace(model.config, hidden_size=table.shape[1])
    _write(directory, transformer, vocabulary, (table * scale).astype(np.float16), folded)


def _times(array: object, factor: float) -> Float32[np.ndarray, "..."]:
    return (np.asarray(array, np.float64) * factor).astype(np.float32)


def _write(
    directory: Path,
    transformer: TransformerConfig,
    vocabulary: Vocabulary,
    table: np.ndarray,
    projection: Projection | None,
) -> None:
    """Writes a model without layers, and its projection in float16."""
    model = NucleotideTransformer(transformer, rngs=nnx.Rngs(0))
    model.word_embeddings.set_value(jnp.asarray(table))
    provenance = Provenance(
        model="bioscan_jax: 6-mers of both strands",
        revision=None,
        weights_sha256="",
        license="Apache-2.0",
        dtype=table.dtype.name,
    )
    write_merged(directory, model, vocabulary, provenance=provenance, base=None, projection=projection)
    if projection is not None:
        write_projection(directory, read_projection(directory), dtype=np.float16)


def _strand_pairs() -> np.ndarray:
    """Returns the column of each 6-mer, by its number in `Vocabulary.sixmer_ids`; one for it and its reverse complement."""
    reverse = reverse_words(6)
    return np.unique(np.minimum(np.arange(len(reverse)), reverse), return_inverse=True)[1]
