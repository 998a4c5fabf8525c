"""One embedding job: what will be read, with which model, in which batches, into which table."""

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, choose_shapes
from bioscan_jax.data.encode import BlockCounts, Encoding, encode_block
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.embedding.repeats import Window, digests, fresh_views, window_blocks
from bioscan_jax.errors import InputError
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.storage import local_directory, table_exists

SAMPLED_ROWS = 65536
"""Rows from the start of the input whose lengths choose the batch widths."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is settled before the first batch."""

    source: ParquetBlocks
    loaded: LoadedModel
    encoding: Encoding
    shapes: tuple[BatchShape, ...]
    data: config.DataConfig
    embed: config.EmbedConfig
    sink: config.SinkConfig

    @property
    def schema(self) -> pa.Schema:
        """Columns of the vector table."""
        return vector_schema(self.source.schema, self.loaded.config.hidden_size, self.sink.vector_dtype)

    @property
    def depth(self) -> int:
        """Layers that are run."""
        return self.loaded.config.resolve_layer(self.embed.layer)

    @property
    def plan(self) -> Plan:
        """All that decides the rows of the table and their values; devices and batching do not."""
        adapter = self.loaded.provenance.adapter_sha256
        return Plan(
            {
                "input": self.source.fingerprint,
                "data": {
                    "sequence_column": self.data.sequence_column,
                    "id_column": self.data.id_column,
                    "max_tokens": self.encoding.max_tokens,
                    "overlong": self.data.overlong,
                    "block_rows": self.data.block_rows,
                },
                "model": {
                    "weights_sha256": self.loaded.provenance.weights_sha256,
                    "dtype": self.loaded.provenance.dtype,
                    "vocabulary_sha256": self.loaded.vocabulary.sha256,
                    "config": dataclasses.asdict(self.loaded.config),
                    # No key without an adapter: tables made before there were any still open.
                    **({} if adapter is None else {"adapter_sha256": adapter}),
                },
                "embed": {
                    "pooling": self.embed.pooling,
                    "layer": self.depth,
                    "strand": self.embed.strand,
                    "phases": self.embed.phases,
                },
                "vector_dtype": self.sink.vector_dtype,
            }
        )

    @property
    def provenance(self) -> dict[str, str]:
        """What made the vectors, for the table's schema metadata."""
        facts = dataclasses.asdict(self.loaded.provenance) | {
            "pooling": self.embed.pooling,
            "layer": self.depth,
            "strand": self.embed.strand,
            "phases": self.embed.phases,
            "max_tokens": self.encoding.max_tokens,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}


def prepare(
    source: ParquetBlocks,
    loaded: LoadedModel,
    data: config.DataConfig,
    embed: config.EmbedConfig,
    sink: config.SinkConfig,
) -> Job:
    """Settles a job; reads the first rows to choose the batch widths.

    Raises:
        InputError: The settings do not fit the model, or no sequence of the input can be embedded.
    """
    encoding = _encoding(source, data, embed, loaded)
    sample = sample_blocks(source, encoding, embed)
    shapes = sample.shapes(embed, loaded.layout.data_devices)
    return Job(source=source, loaded=loaded, encoding=encoding, shapes=shapes, data=data, embed=embed, sink=sink)


def _encoding(
    source: ParquetBlocks, data: config.DataConfig, embed: config.EmbedConfig, loaded: LoadedModel
) -> Encoding:
    limit = loaded.config.max_tokens
    if data.max_tokens is not None and data.max_tokens > limit:
        raise InputError(
            f"--data.max_tokens {data.max_tokens} exceeds the {limit} positions of {loaded.provenance.model}; "
            f"pass at most {limit}"
        )
    loaded.config.resolve_layer(embed.layer)
    return Encoding(
        sequence_column=source.sequence_column,
        vocabulary=loaded.vocabulary,
        max_tokens=data.max_tokens or limit,
        overlong=data.overlong,
        strand=embed.strand,
        phases=embed.phases,
        deduplicate=embed.deduplicate,
    )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first blocks of an input."""

    blocks: list[TokenRows]
    """What of each is computed."""
    counts: BlockCounts
    max_tokens: int
    """No row of tokens is longer."""

    @property
    def lengths(self) -> list[Int[np.ndarray, " _"]]:
        """Tokens of each row of tokens in each block."""
        return [tokens.lengths for tokens in self.blocks]

    def shapes(self, embed: config.EmbedConfig, devices: int) -> tuple[BatchShape, ...]:
        """The batch shapes for blocks like these."""
        return choose_shapes(
            self.lengths, self.max_tokens, most=embed.max_shapes, devices=devices, tokens_per_device=embed.batch_tokens
        )


def sample_blocks(source: ParquetBlocks, encoding: Encoding, embed: config.EmbedConfig) -> Sample:
    """Reads the first blocks, as a run that starts there would, until SAMPLED_ROWS rows and one that is no reject.

    Raises:
        InputError: No sequence of the input can be embedded.
    """
    blocks, counts, window = [], BlockCounts(), Window(window_blocks(embed, source.block_rows))
    for index in range(len(source)):
        encoded = encode_block(source[index], encoding)
        repeats = window.see(index, digests(encoded.views, encoded.counts.distinct))
        counts += encoded.counts
        blocks.append(fresh_views(encoded.views, repeats.copied).tokens)
        if counts.rows >= SAMPLED_ROWS and counts.vectors:
            break
    if not counts.vectors:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.rejects.items())
        raise InputError(
            f"no sequence in column {encoding.sequence_column!r} can be embedded ({reasons}); "
            "is it DNA? pass another --data.sequence_column"
        )
    # Where every row was seen, no batch need be wider than the widest.
    widest = -(-max(int(tokens.lengths.max(initial=1)) for tokens in blocks) // WIDTH_STEP) * WIDTH_STEP
    limit = min(encoding.max_tokens, widest) if counts.rows == source.rows else encoding.max_tokens
    return Sample(blocks=blocks, counts=counts, max_tokens=limit)


@contextmanager
def scratch_directory(sink: config.SinkConfig, *, owned: bool) -> Iterator[Path]:
    """Where FASTA input is kept as Parquet: beside the table, or in a temporary directory.

    It is removed at the end, and after a failure unless there is a table by then, which the next run goes on with.

    Args:
        sink: The table.
        owned: This process holds the table's lock, and removes the directory.
    """
    local = local_directory(sink.uri)
    key = hashlib.sha256(f"{sink.uri}/{sink.table}".encode()).hexdigest()[:16]
    temporary = Path(tempfile.gettempdir()) / f"bioscan_jax-{key}.input"
    scratch = temporary if local is None else local / f".{sink.table}.input"
    try:
        yield scratch
    except BaseException:
        if owned and not table_exists(sink.uri, sink.table):
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    if owned:
        shutil.rmtree(scratch, ignore_errors=True)
