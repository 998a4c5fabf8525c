"""Trains the model in the package from labelled barcodes: whitened 6-mers and columns, with a residual network beside.

A barcode's vector is made of which base it has in each column of an alignment of the marker (`barcodes.columns`), and of
how often it has each of the 2,080 6-mers, where a 6-mer and its reverse complement are one: so both strands have the
same vector. A barcode of another marker has no columns, and is compared by its 6-mers alone. Both are the mean of token
embeddings over the six start phases and the columns, that is hidden state 0 of a Nucleotide Transformer without layers
whose vocabulary has the columns' bases, too. `fit_metric` learns what they mean; its linear map is then folded into the
token embeddings, so that the model costs one matrix product per barcode.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Float32

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.columns import UNIT, Columns
from bioscan_jax.barcodes.strands import reverse_words
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.checkpoints.projection_files import read_projection, write_projection
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.data.parquet import open_source
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

# Aligned bases and 6-mers of both strands, whitened, with a network beside

A Nucleotide Transformer without layers: embeddings of 6-mers, averaged over six start phases, and of the bases in the
columns of an alignment; and a projection. A barcode and its reverse complement have the same vector.

    import bioscan_jax as bj
    vectors = bj.load("DIRECTORY_OF_THIS_FILE").encode(["ACGT..."])

{description}.
"""
COUNTED_AT = config.EmbedConfig(layer=0, phases=6, pooling="mean")
"""How the raw vectors are made."""
_SIXMER_WEIGHT = 0.25
"""Of 6-mer frequencies beside the bases in columns: these then have about four times as much variance."""
_CONTRASTS = np.array([[3, 0, 0], [-1, 2, 0], [-1, -1, 1], [-1, -1, -1]]) / np.sqrt([12, 6, 2])
"""Orthonormal: four numbers whose sum is 0, such as a base less the frequencies of its column, as three."""
_ALIGNED_ROWS = 20_000
"""Most barcodes, evenly spread over the input, that the columns are found by."""


def train_default_model(
    data: config.DataConfig,
    output: str,
    metric: config.MetricConfig = config.MetricConfig(network=True),  # noqa: B008 - frozen
    *,
    work: str,
    columns: bool = True,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
    progress: bool = True,
) -> MetricSummary:
    """Trains a model like the one in the package.

    Args:
        data: Labelled barcodes.
        output: Directory or URL to make; `bioscan_jax.load(output)` loads the model.
        metric: How the projection is fitted.
        work: Directory for the raw vectors' model, their table and the fit; a stopped call continues there.
        columns: Align the barcodes, which must be of one marker; otherwise 6-mers are counted alone.
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
            write_counts(base, _find_columns(data, directory) if columns else None)
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


def _find_columns(data: config.DataConfig, scratch: Path) -> Columns:
    """Aligns barcodes of the input."""
    source = open_source(data, scratch=scratch)
    blocks = np.unique(np.linspace(0, len(source) - 1, max(_ALIGNED_ROWS // source.block_rows, 1)).astype(np.int64))
    cleaned = [clean(source[block].table[source.sequence_column]).sequences for block in blocks.tolist()]
    return Columns.of(pa.concat_arrays(cleaned).drop_null())


def write_counts(directory: Path, columns: Columns | None) -> None:
    """Writes a checkpoint without layers whose token embeddings count 6-mers, each with its reverse complement.

    Args:
        directory: Directory to make.
        columns: Its bases are counted, too: each less the mean of its column, so that a column without a base is as one
            with the mean.
    """
    vocabulary = Vocabulary.published("v2")
    pairs = _strand_pairs()
    sixmers = int(pairs.max()) + 1
    bases = np.zeros((0, 4))
    if columns is not None:
        vocabulary = vocabulary.with_columns(columns)
        bases = np.exp(columns.scores / UNIT)
        bases /= bases.sum(axis=1, keepdims=True)
    transformer = dataclasses.replace(
        PRESETS["tiny-v2"],
        vocab_size=len(vocabulary.tokens),
        hidden_size=sixmers + 3 * len(bases),
        num_hidden_layers=0,
        num_attention_heads=1,
    )
    table = np.zeros((transformer.vocab_size, transformer.hidden_size), np.float32)
    table[vocabulary.sixmer_ids, pairs] = 1.0 if columns is None else _SIXMER_WEIGHT
    for number, (ids, frequencies) in enumerate(zip(vocabulary.column_ids[:, :4], bases, strict=True)):
        first = sixmers + 3 * number
        table[ids, first : first + 3] = (np.eye(4) - frequencies) @ _CONTRASTS
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
        model="bioscan_jax: aligned bases and 6-mers of both strands",
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
