"""Samples the lengths of an input's barcodes, and forms the batches that a run would make of them."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.labels import name_codes
from bioscan_jax.barcodes.lineage import lineage_columns, missing_lineages, read_lineages
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, choose_widths, fitted_shapes, make_batches
from bioscan_jax.data.encode import Encoding
from bioscan_jax.data.parquet import ParquetBlocks, open_source
from bioscan_jax.embedding.sample import SAMPLED_ROWS, sample_blocks
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.training.batches import sampler


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Some rows of an input, as batches."""

    rows: int
    """Rows read."""
    vectors: int
    """Rows that get a vector, or are trained on once per epoch."""
    lengths: Int[np.ndarray, " views"]
    """Tokens of each computed row, CLS included."""
    batches: dict[BatchShape, int]
    """Number of batches of each shape."""


def embedding_workload(
    data: config.DataConfig, embed: config.EmbedConfig, transformer: TransformerConfig, devices: int
) -> Workload:
    """Forms the batches of `embed` for rows spread over the input: de-duplicated within blocks, cut into views, batched.

    Args:
        data: Where the barcodes are; only the sequences are read.
        embed: Views and batching.
        transformer: Determines the vocabulary and the most tokens per row.
        devices: Devices along the batch, in one process.

    Raises:
        InputError: The input cannot be read, or nothing in it can be embedded.
    """
    vocabulary = _vocabulary(transformer)
    with tempfile.TemporaryDirectory() as scratch:
        source = _sequences(data, scratch)
        encoding = Encoding(
            sequence_column=source.sequence_column,
            vocabulary=vocabulary,
            max_tokens=data.max_tokens or transformer.max_tokens,
            overlong=data.overlong,
            strand=embed.strand,
            phases=embed.phases,
            deduplicate=embed.deduplicate,
        )
        sample = sample_blocks(source, encoding, embed)
    sample.check(source.sequence_column)
    shapes, spare = sample.shapes(embed, devices), sample.spare_shapes(embed, devices)
    ids = {"cls": vocabulary.cls_id, "pad": vocabulary.pad_id}
    batches = Counter(
        BatchShape(*batch.ids.shape)
        for tokens in sample.blocks
        for batch in make_batches(tokens, fitted_shapes(tokens.lengths, shapes, spare), **ids)
    )
    counts, lengths = sample.counts, np.concatenate(sample.lengths)
    return Workload(rows=counts.rows, vectors=counts.vectors, lengths=lengths, batches=dict(batches))


def training_workload(
    data: config.ExamplesConfig, train: config.TrainConfig, transformer: TransformerConfig
) -> Workload:
    """Forms the batches of one epoch of `finetune` for the first rows, as whole sequences; splits are ignored.

    Labels are read where `train.sampler` or `train.balance` needs them.

    Args:
        data: Where the barcodes are.
        train: Batching.
        transformer: Determines the vocabulary and the most tokens per row.

    Raises:
        InputError: The input cannot be read, lacks the lineages, or nothing in it can be trained on.
    """
    grouped = train.objective == "taxonomy" and (train.sampler == "genera" or train.balance != "none")
    limit = data.max_tokens or transformer.max_tokens
    source_of = config.DataConfig(
        path=data.path, sequence_column=data.sequence_column, id_column=data.id_column, id=data.id
    )
    read, every, lineages = 0, [], []
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(source_of, scratch=Path(scratch), for_table=False)
        ranks = lineage_columns(source.schema.names) if grouped else []
        if grouped and not ranks:
            raise missing_lineages(source.schema.names)
        blocks = source.select([source.sequence_column, *ranks], source.block_rows)
        for index in range(len(blocks)):
            table = blocks[index].table
            cleaned = clean(table[source.sequence_column])
            usable = cleaned.reasons.is_null()
            tokens = encode(cleaned.sequences.filter(usable), _vocabulary(transformer))
            read += len(cleaned.reasons)
            every.append(np.minimum(tokens.lengths, limit))
            lineages.append(table.select(ranks).filter(usable))
            if read >= SAMPLED_ROWS:
                break
        whole, column = read == source.rows, source.sequence_column
    lengths, labels = np.concatenate(every), None
    if grouped:
        labels = _codes(pa.concat_tables(lineages))
        known = (labels >= 0).any(axis=1)
        lengths, labels = lengths[known], labels[known]
    if not len(lengths):
        raise InputError(f"no sequence in column {column!r} can be trained on; pass another --data.sequence_column")
    widths = np.array(_widths(lengths, limit, train.max_shapes, whole=whole))
    rows = np.arange(len(lengths))
    order = sampler(rows, lengths, labels, train)(epoch=0)
    longest = np.where(order >= 0, lengths[order], 0).max(axis=1)
    batches = Counter(widths[np.searchsorted(widths, longest)].tolist())
    return Workload(
        rows=read,
        vectors=len(lengths),
        lengths=lengths[order[order >= 0]],
        batches={BatchShape(train.batch_size, width): count for width, count in sorted(batches.items())},
    )


def _codes(lineages: pa.Table) -> Int32[np.ndarray, "rows 7"]:
    """Numbers the names of each rank in alphabetical order, as a label space does; -1 is unknown."""
    return np.stack([name_codes(one, one.unique().drop_null().sort()) for one in read_lineages(lineages)], axis=1)


def _sequences(data: config.DataConfig, scratch: str) -> ParquetBlocks:
    source = open_source(data, scratch=Path(scratch))
    return source.select([source.sequence_column], source.block_rows)


def _vocabulary(transformer: TransformerConfig) -> Vocabulary:
    return Vocabulary.published("v2" if transformer.gated else "v1")


def _widths(lengths: Int[np.ndarray, " views"], limit: int, most: int, *, whole: bool) -> tuple[int, ...]:
    """Chooses the widths of batches; if all rows were read, none is wider than the longest row, as in a run."""
    longest = min(limit, -(-int(lengths.max()) // WIDTH_STEP) * WIDTH_STEP)
    return choose_widths(lengths, longest if whole else limit, most)
