"""Barcodes to vectors in memory, by the very model and settings that made a table."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from bioscan_jax import config
from bioscan_jax.checkpoints.load import RANDOM, LoadedModel, load_weights
from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, batch_shapes, choose_widths, make_batches
from bioscan_jax.data.encode import EncodedBlock, Encoding, encode_block
from bioscan_jax.data.parquet import Block, ParquetBlocks, open_source
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.encoder import CompiledSteps, collect, sequence_vectors
from bioscan_jax.errors import InputError
from bioscan_jax.matching.reference import Reference
from bioscan_jax.table.columns import check_values

_RANDOM = re.compile(rf"({RANDOM}\S+) \(seeded random weights, seed (\d+): not trained\)")
_BATCH_TOKENS = 16384
_BLOCK_ROWS = 4096


@dataclass
class Embedder:
    """A model, ready to make vectors as a table has them."""

    loaded: LoadedModel
    encoding: Encoding
    embed: config.EmbedConfig
    steps: CompiledSteps
    shapes: tuple[BatchShape, ...] = ()
    """Chosen from the first block."""

    def __call__(self, block: Block) -> tuple[EncodedBlock, Float32[np.ndarray, "kept hidden"]]:
        """Embeds a block.

        Returns:
            The block with its rejects, and one vector for each row that was kept.
        """
        encoded = encode_block(block, self.encoding)
        width, distinct = self.loaded.config.hidden_size, encoded.counts.distinct
        if not distinct:
            return encoded, np.empty((0, width), np.float32)
        tokens, vocabulary = encoded.views.tokens, self.encoding.vocabulary
        longest = min(-(-int(tokens.lengths.max()) // WIDTH_STEP) * WIDTH_STEP, self.encoding.max_tokens)
        if not self.shapes or longest > self.shapes[-1].tokens:
            self.shapes = batch_shapes(
                choose_widths(tokens.lengths, longest, self.embed.max_shapes),
                devices=self.loaded.layout.data_devices,
                tokens_per_device=_BATCH_TOKENS,
                most_rows=len(tokens),
            )
        batches = make_batches(tokens, self.shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id)
        by_view = collect([(batch, self.steps(batch.ids)) for batch in batches], len(tokens), width)
        vectors = sequence_vectors(by_view, encoded.views, distinct, self.embed.pooling)
        return encoded, vectors[encoded.sequence_of]


def recorded_model(facts: dict[str, str]) -> config.ModelConfig:
    """What the table's metadata says of the model, as one would ask for it again."""
    name, dtype = facts["model"], facts["dtype"]
    made: dict[str, Any] = {"revision": facts.get("revision"), "adapter": facts.get("adapter"), "dtype": dtype}
    if found := _RANDOM.fullmatch(name):
        return config.ModelConfig(checkpoint=found[1], seed=int(found[2]), **made)
    return config.ModelConfig(checkpoint=name, **made)


def make_embedder(
    reference: Reference, model: config.ModelConfig | None, mesh: config.MeshConfig | None = None
) -> Embedder:
    """Loads the model that made the reference's vectors, and makes sure that it is that one.

    Args:
        reference: The table.
        model: Where model and adapter are now, if not where the table says.
        mesh: Devices.

    Raises:
        InputError: The model cannot be loaded, or is another than the table's.
    """
    mesh = mesh or config.MeshConfig()
    facts, plan = reference.facts, reference.plan
    recorded = recorded_model(facts)
    if model is not None:
        dtype = recorded.dtype if model.dtype == "auto" else model.dtype
        model = dataclasses.replace(model, dtype=dtype)
    start_devices(mesh)
    try:
        loaded = load_weights(model or recorded, make_layout(mesh))
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"{error} (the vectors of {reference.dataset.uri} were made by {facts['model']!r}"
            f"{' with adapter ' + repr(facts['adapter']) if 'adapter' in facts else ''}; pass where it is now as "
            "--model.checkpoint, with --model.adapter if there was one)"
        ) from error
    _check_same(loaded, plan["model"], reference)
    embed = config.EmbedConfig(
        pooling=plan["embed"]["pooling"],
        layer=plan["embed"]["layer"],
        strand=plan["embed"]["strand"],
        phases=plan["embed"]["phases"],
    )
    encoding = Encoding(
        sequence_column="",
        vocabulary=loaded.vocabulary,
        max_tokens=plan["data"]["max_tokens"],
        overlong=plan["data"]["overlong"],
        strand=embed.strand,
        phases=embed.phases,
        deduplicate=True,
    )
    return Embedder(loaded, encoding, embed, CompiledSteps(loaded.model, loaded.layout, embed))


def _check_same(loaded: LoadedModel, wanted: dict[str, Any], reference: Reference) -> None:
    given = {
        "weights_sha256": loaded.provenance.weights_sha256,
        "adapter_sha256": loaded.provenance.adapter_sha256,
        "vocabulary_sha256": loaded.vocabulary.sha256,
        "dtype": loaded.provenance.dtype,
    }
    different = [name for name, value in given.items() if wanted.get(name) != value]
    if different:
        says = ", ".join(f"{name} {_short(wanted.get(name))} is {_short(given[name])} here" for name in different)
        raise InputError(
            f"{reference.dataset.uri} was made by another model ({says}); its vectors are those of "
            f"{reference.facts['model']!r}: pass that one as --model.checkpoint and its adapter as --model.adapter"
        )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


@contextmanager
def _as_query_flags() -> Iterator[None]:
    """Messages about input name the flags of embedding; here they begin with --query."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data.", "--query.")) from error


def open_queries(query: config.QueryConfig, scratch: Path) -> ParquetBlocks:
    """Opens the barcodes to identify.

    Args:
        query: Where they are.
        scratch: Directory for the Parquet form of FASTA.

    Raises:
        InputError: There is nothing to read, or a column is missing.
    """
    data = config.DataConfig(
        path=query.path, sequence_column=query.sequence_column, id_column=query.id_column, block_rows=_BLOCK_ROWS
    )
    with _as_query_flags():
        return open_source(data, scratch=scratch)


def embed_blocks(
    embedder: Embedder, source: ParquetBlocks
) -> Iterator[tuple[EncodedBlock, Float32[np.ndarray, "kept hidden"]]]:
    """Embeds the queries, block by block.

    Args:
        embedder: The model.
        source: From `open_queries`.

    Raises:
        InputError: A value cannot be read.
    """
    embedder.encoding = dataclasses.replace(embedder.encoding, sequence_column=source.sequence_column)
    with _as_query_flags():
        for index in range(len(source)):
            block = source[index]
            check_values(block.table, lambda row, first=block.first_row: source.locate(first + row))
            yield embedder(block)


def embed_sequences(embedder: Embedder, sequences: list[str]) -> Float32[np.ndarray, "sequences hidden"]:
    """Embeds DNA given as text.

    Raises:
        InputError: One of them has no vector.
    """
    ids = pa.array([str(i) for i in range(len(sequences))], pa.string())
    table = pa.table({"sequence_id": ids, "dna_sequence": pa.array(sequences, pa.string())})
    embedder.encoding = dataclasses.replace(embedder.encoding, sequence_column="dna_sequence")
    encoded, vectors = embedder(Block(0, 0, table))
    if encoded.rejects.num_rows:
        bad = encoded.rejects.slice(0, 1).to_pylist()[0]
        raise InputError(f"sequence {(bad['sequence'] or '')[:60]!r} has no vector ({bad['reason']}); pass DNA")
    return vectors
