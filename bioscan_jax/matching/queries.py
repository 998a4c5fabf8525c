"""Opens the barcodes to identify, and embeds them with the model and settings that made a table."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc
from jaxtyping import Bool, Float32

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean, reverse_complement
from bioscan_jax.barcodes.strands import StrandProfile
from bioscan_jax.checkpoints.load import LoadedModel, load_weights, recorded_model
from bioscan_jax.data.encode import EncodedBlock, Encoding
from bioscan_jax.data.in_memory import SequencesInMemory
from bioscan_jax.data.parquet import Block, ParquetBlocks, check_unique_ids, open_source
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.block_encoder import BlockEncoder
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.errors import InputError, logger
from bioscan_jax.matching.reference import Reference

_BLOCK_ROWS = 2048


def encoder_of_table(
    reference: Reference,
    model: config.ModelConfig | None,
    mesh: config.MeshConfig | None = None,
    batch_tokens: int = config.EmbedConfig.batch_tokens,
) -> Encoder:
    """Loads the model that made a table's vectors, with the settings that made them, and checks its identity.

    Args:
        reference: The table.
        model: Where model and adapter are now, if not where the table says.
        mesh: Devices.
        batch_tokens: Tokens per data device in one batch.

    Raises:
        InputError: The model cannot be loaded, or is not the table's.
    """
    mesh = mesh or config.MeshConfig()
    facts, plan = reference.facts, reference.plan
    recorded = recorded_model(facts)
    if model is not None:
        dtype = recorded.dtype if model.dtype == "auto" else model.dtype
        projection = recorded.projection if model.projection == "auto" else model.projection
        model = dataclasses.replace(model, dtype=dtype, projection=projection)
    start_devices(mesh)
    try:
        loaded = load_weights(model or recorded, make_layout(mesh))
    except InputError as error:
        if model is not None:
            raise
        raise InputError(
            f"{error} (the vectors of {reference.dataset.uri} were made by {facts['model']!r}"
            f"{' with adapter ' + repr(facts['adapter']) if 'adapter' in facts else ''}"
            f"{' and projection ' + repr(facts['projection']) if 'projection' in facts else ''}; pass where it is now "
            "as --model.checkpoint, with --model.adapter and --model.projection if there were any)"
        ) from error
    _check_same(loaded, plan["model"], reference)
    if plan["embed"]["phases"] > 1 and "phase_of" not in plan["embed"]:
        logger.warning(
            f"{reference.dataset.uri} was made when start phases applied to the start of a sequence alone: its vectors "
            "of sequences with N are not like those of the queries; embed it again"
        )
    settings = {name: plan["embed"][name] for name in ("pooling", "layer", "strand", "phases")}
    return Encoder(
        loaded=loaded,
        settings=config.EmbedConfig(**settings, batch_tokens=batch_tokens),
        max_tokens=plan["data"]["max_tokens"],
        overlong=plan["data"]["overlong"],
        wanted=model or recorded,
    )


def _check_same(loaded: LoadedModel, wanted: dict[str, Any], reference: Reference) -> None:
    found = {
        "weights_sha256": loaded.provenance.weights_sha256,
        "adapter_sha256": loaded.provenance.adapter_sha256,
        "vocabulary_sha256": loaded.vocabulary.sha256,
        "dtype": loaded.provenance.dtype,
        "projection_sha256": None if loaded.projection is None else loaded.projection.sha256,
    }
    different = [name for name, value in found.items() if wanted.get(name) != value]
    if different:
        listed = ", ".join(f"{name} {_short(wanted.get(name))} is {_short(found[name])} here" for name in different)
        raise InputError(
            f"{reference.dataset.uri} was made by another model ({listed}); its vectors are those of "
            f"{reference.facts['model']!r}: pass that one as --model.checkpoint, its adapter as --model.adapter "
            "and its projection as --model.projection"
        )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


@contextmanager
def _as_query_flags() -> Iterator[None]:
    """Replaces the flags of embed, which messages about the input and its batches name, by those of queries."""
    try:
        yield
    except InputError as error:
        raise InputError(
            str(error).replace("--data.", "--query.").replace("--embed.batch_tokens", "--batch_tokens")
        ) from error


def open_queries(query: config.QueryConfig, scratch: Path) -> ParquetBlocks:
    """Opens the barcodes to identify.

    Args:
        query: Where they are.
        scratch: Directory for the Parquet form of FASTA.

    Raises:
        InputError: There is nothing to read, or a column is missing.
    """
    data = config.DataConfig(
        path=query.path,
        sequence_column=query.sequence_column,
        id_column=query.id_column,
        id=query.id,
        block_rows=_BLOCK_ROWS,
    )
    with _as_query_flags():
        return open_source(data, scratch=scratch, for_table=False)


def check_query_ids(source: ParquetBlocks) -> None:
    """Checks that no two queries have the same id.

    Raises:
        InputError: Two have, or one has none.
    """
    with _as_query_flags():
        check_unique_ids(source)


@dataclass(frozen=True, eq=False)
class QueryEncoder:
    """Embeds queries block by block, each on the strand that its words suggest."""

    encoder: Encoder
    source: ParquetBlocks
    profile: StrandProfile | None
    """Of the references; None to embed the queries as they are written."""
    first_block: int = 0
    """Block to begin with."""

    def __iter__(
        self,
    ) -> Iterator[tuple[EncodedBlock, Float32[np.ndarray, "kept hidden"], Bool[np.ndarray, " kept"]]]:
        """Yields each block, the vectors of its usable rows, and which of these are of the reverse complement.

        The DNA in a block is that of the strand that was embedded.

        Raises:
            InputError: A value cannot be read.
        """
        with _as_query_flags():
            settings = self.encoder.settings
            turned = dataclasses.replace(self._turned, first_block=self.first_block)
            for encoded, vectors in self.encoder.encode_blocks(turned, self._encoding, settings, blocks=self._blocks):
                reverse = turned.reverse.pop(encoded.block.index, None)
                kept = np.zeros(len(encoded.kept), bool) if reverse is None else reverse[encoded.kept]
                yield encoded, vectors, kept

    def encode(self, texts: list[str]) -> Float32[np.ndarray, "texts hidden"]:
        """Embeds cleaned DNA with the executables of the blocks."""
        given = SequencesInMemory(pa.array(texts, pa.large_string()), _BLOCK_ROWS, self._encoding.sequence_column)
        found = self.encoder.encode_blocks(given, self._encoding, self.encoder.settings, blocks=self._blocks)
        return np.concatenate([vectors for _, vectors in found])

    @cached_property
    def _turned(self) -> "_TurnedBlocks":
        return _TurnedBlocks(self.source, self.profile)

    @cached_property
    def _encoding(self) -> Encoding:
        return self.encoder.encoding(self.encoder.settings, self.source.sequence_column)

    @cached_property
    def _blocks(self) -> BlockEncoder:
        return self.encoder.block_encoder(self._turned, self._encoding, self.encoder.settings)


@dataclass(frozen=True, eq=False)
class _TurnedBlocks:
    """Blocks of queries in which DNA that reads like the other strand of the references is reverse complemented."""

    source: ParquetBlocks
    profile: StrandProfile | None
    first_block: int = 0
    reverse: dict[int, np.ndarray] = field(default_factory=dict)
    """Which rows of a block are, by the number of the block."""

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def block_rows(self) -> int:
        return self.source.block_rows

    def __len__(self) -> int:
        return len(self.source) - self.first_block

    def __getitem__(self, index: int, /) -> Block:
        block, name = self.source[self.first_block + index], self.source.sequence_column
        if self.profile is None:
            return block
        cleaned = clean(block.table[name]).sequences
        reverse = self.profile.scores(cleaned) < 0
        self.reverse[block.index] = reverse
        if not reverse.any():
            return block
        given = block.table[name].cast(pa.large_string()).combine_chunks()
        turned = pc.if_else(pa.array(reverse), reverse_complement(cleaned), given)
        column = block.table.column_names.index(name)
        return Block(block.index, block.first_row, block.table.set_column(column, name, turned))

    def locate(self, row: int, first: int = 0) -> str:
        return self.source.locate(row, first)
