"""An embedding job: which input, with which model, in which batches, into which table."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.checkpoints.load import LoadedModel
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.embedding.block_encoder import BlockEncoder
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.location import local_directory
from bioscan_jax.output import private_directory
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.storage import table_exists


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input, model, settings and table of a run, as settled before the first batch."""

    source: ParquetBlocks
    loaded: LoadedModel
    blocks: BlockEncoder
    data: config.DataConfig
    embed: config.EmbedConfig
    sink: config.SinkConfig

    @property
    def schema(self) -> pa.Schema:
        """The columns of the vector table."""
        return vector_schema(self.source.schema, self.dimension, self.sink.vector_dtype)

    @property
    def dimension(self) -> int:
        """Numbers per vector."""
        projection = self.loaded.projection
        return self.loaded.config.hidden_size if projection is None else projection.dimension

    @property
    def devices(self) -> str:
        """How many devices there are, and of which kind."""
        devices = self.loaded.layout.mesh.devices
        return f"{devices.size} x {devices.flat[0].device_kind}"

    @property
    def depth(self) -> int:
        """Number of layers that are computed."""
        return self.loaded.config.resolve_layer(self.embed.layer)

    @property
    def plan(self) -> Plan:
        """What decides the rows of the table and their values; devices and batching are not part of it."""
        adapter, projection = self.loaded.provenance.adapter_sha256, self.loaded.projection
        return Plan(
            {
                "input": self.source.fingerprint,
                "data": {
                    "sequence_column": self.source.sequence_column,
                    "id_column": self.source.id_column,
                    # No key where it is the default: tables made before there was this setting still open.
                    **({} if self.data.id == "column" else {"id": self.data.id}),
                    "max_tokens": self.blocks.encoding.max_tokens,
                    "overlong": self.data.overlong,
                    "block_rows": self.data.block_rows,
                },
                "model": {
                    "weights_sha256": self.loaded.provenance.weights_sha256,
                    "dtype": self.loaded.provenance.dtype,
                    "vocabulary_sha256": self.loaded.vocabulary.sha256,
                    "config": dataclasses.asdict(self.loaded.config),
                    # Absent without one, so that tables made before adapters and projections existed still open.
                    **({} if adapter is None else {"adapter_sha256": adapter}),
                    **({} if projection is None else {"projection_sha256": projection.sha256}),
                },
                "embed": {
                    "pooling": self.embed.pooling,
                    "layer": self.depth,
                    "strand": self.embed.strand,
                    "phases": self.embed.phases,
                    # With one phase no vector depends on it. Tables of several phases without it were made when phases
                    # applied to the start of a sequence alone: those of sequences with N have other vectors.
                    **({"phase_of": "stretch"} if self.embed.phases > 1 else {}),
                },
                "vector_dtype": self.sink.vector_dtype,
            }
        )

    @property
    def provenance(self) -> dict[str, str]:
        """The model and settings that made the vectors, for the table's schema metadata."""
        facts = self.loaded.facts | {
            "pooling": self.embed.pooling,
            "layer": self.depth,
            "strand": self.embed.strand,
            "phases": self.embed.phases,
            "max_tokens": self.blocks.encoding.max_tokens,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}


def prepare(
    source: ParquetBlocks,
    encoder: Encoder,
    data: config.DataConfig,
    embed: config.EmbedConfig,
    sink: config.SinkConfig,
) -> Job:
    """Settles a job; reads some of the rows to choose the batch shapes.

    The job keeps the layers of the model that it needs, and no others.

    Raises:
        InputError: The settings do not fit the model, or no sequence of the input can be embedded.
    """
    embed, data = encoder.with_projection(embed, data)
    encoder = encoder.with_layers(embed.layer)
    encoding = encoder.encoding(embed, source.sequence_column, max_tokens=data.max_tokens, overlong=data.overlong)
    sample = encoder.sample(source.select([source.sequence_column], source.block_rows), encoding, embed)
    sample.check(source.sequence_column)
    blocks = encoder.block_encoder(source, encoding, embed, sample=sample)
    return Job(source=source, loaded=encoder.loaded, blocks=blocks, data=data, embed=embed, sink=sink)


@contextmanager
def scratch_directory(sink: config.SinkConfig, *, owned: bool) -> Iterator[Path]:
    """Provides the directory that keeps FASTA input as Parquet: beside a local table, or a temporary one.

    It is removed at the end. After a failure it stays if the table exists by then, since the next run continues that.

    Args:
        sink: The table.
        owned: Whether this process holds the table's lock, and so removes the directory.
    """
    local = local_directory(sink.uri)
    key = hashlib.sha256(f"{sink.uri}/{sink.table}".encode()).hexdigest()[:16]
    scratch = private_directory() / f"{key}.input" if local is None else local / f".{sink.table}.input"
    try:
        yield scratch
    except BaseException:
        if owned and not table_exists(sink.uri, sink.table):
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    if owned:
        shutil.rmtree(scratch, ignore_errors=True)
