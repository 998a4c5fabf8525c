"""Copies the vectors of sequences that were embedded in one of the last few blocks, instead of computing them again.

The input alone decides what is copied: a sequence is copied if one of the last blocks has it, since all its occurrences
there have the same vector. After a restart those blocks are read again and their vectors are taken from the table, so
that an interrupted run gives the same bits as an uninterrupted one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.views import Views
from bioscan_jax.data.encode import NOT_FINITE, EncodedBlock
from bioscan_jax.errors import InputError
from bioscan_jax.table.storage import open_dataset, storage_errors, table_path

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Repeats:
    """Which sequences of a block an earlier block has, and where there."""

    copied: Bool[np.ndarray, " sequences"]
    blocks: Int[np.ndarray, " copied"]
    """The earlier block of each copied sequence."""
    places: Int[np.ndarray, " copied"]
    """Its index among that block's sequences."""

    @classmethod
    def none(cls, sequences: int) -> "Repeats":
        """Returns the repeats of a block none of whose sequences is copied."""
        return cls(np.zeros(sequences, bool), np.empty(0, np.int64), np.empty(0, np.int64))


class PreparedBlock(NamedTuple):
    """A tokenised block, divided into what is copied and what is computed."""

    encoded: EncodedBlock
    repeats: Repeats
    """Sequences whose vectors are copied from earlier blocks."""
    views: Views
    """The views of the other sequences; `owner` counts these from 0."""

    @property
    def fresh(self) -> int:
        """Number of sequences to compute."""
        return len(self.repeats.copied) - int(self.repeats.copied.sum())


@dataclass(frozen=True)
class Window:
    """Finds the sequences of a block among those of the last blocks; blocks must be looked up in order."""

    blocks: int
    """How many blocks are remembered."""
    _latest: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    _seen: dict[int, Sequence[bytes]] = field(default_factory=dict)

    def prepare(self, encoded: EncodedBlock, names: Sequence[bytes] | None = None) -> PreparedBlock:
        """Looks up a block's sequences.

        Args:
            encoded: The block.
            names: Its `digests`, where they have been computed already.
        """
        count = encoded.counts.distinct
        if not self.blocks:
            return PreparedBlock(encoded, Repeats.none(count), encoded.views)
        repeats = self.look_up(encoded.block.index, digests(encoded.views, count) if names is None else names)
        return PreparedBlock(encoded, repeats, fresh_views(encoded.views, repeats.copied))

    def look_up(self, index: int, digests: Sequence[bytes]) -> Repeats:
        """Finds a block's sequences among those of the last blocks, and remembers them."""
        found = [self._latest.get(digest) for digest in digests]
        if self.blocks:
            self._seen[index] = digests
            self._latest.update((digest, (index, place)) for place, digest in enumerate(digests))
        if len(self._seen) > self.blocks:
            oldest = next(iter(self._seen))
            for digest in self._seen.pop(oldest):
                if (latest := self._latest.get(digest)) is not None and latest[0] == oldest:
                    del self._latest[digest]
        where = np.array([place for place in found if place is not None], np.int64).reshape(-1, 2)
        return Repeats(np.array([place is not None for place in found], bool), where[:, 0], where[:, 1])


@dataclass(frozen=True)
class VectorCache:
    """The vectors of the last blocks, as they are stored."""

    blocks: int
    """How many blocks are kept."""
    sink: config.SinkConfig | None = None
    """The table with the vectors of blocks that an earlier run committed."""
    _held: dict[int, Float[np.ndarray, "sequences d"]] = field(default_factory=dict)
    _committed: dict[int, UInt64[np.ndarray, " sequences"]] = field(default_factory=dict)

    def add_committed(self, index: int, source_rows: UInt64[np.ndarray, " sequences"]) -> None:
        """Records which rows of the table hold the vectors of a block that an earlier run committed."""
        self._committed[index] = source_rows

    def complete(
        self, prepared: PreparedBlock, fresh: Float[np.ndarray, "fresh d"]
    ) -> Float[np.ndarray, "sequences d"]:
        """Adds the copied vectors of a block to those just computed, and keeps all of them for later blocks.

        Raises:
            InputError: The table, which holds the vectors of an earlier run, cannot be read or was altered.
        """
        values, copied = fresh, prepared.repeats.copied
        if copied.any():
            values = np.empty((len(copied), fresh.shape[1]), fresh.dtype)
            self.fill(values, prepared)
            values[~copied] = fresh
        self.keep(prepared, values)
        return values

    def fill(self, values: Float[np.ndarray, "sequences d"], prepared: PreparedBlock, stored: int = 0) -> None:
        """Fills in the vectors of a block that are copied, and its first `stored` ones, which the table has.

        Raises:
            InputError: As `complete`.
        """
        self._copy_into(values, prepared.repeats)
        if stored:
            values[:stored] = self._read(first_rows(prepared.encoded)[:stored], values.shape[1])

    def keep(self, prepared: PreparedBlock, values: Float[np.ndarray, "sequences d"]) -> None:
        """Keeps the vectors of a whole block for later ones."""
        if self.blocks:
            self._held[prepared.encoded.block.index] = values
        if len(self._held) > self.blocks:
            del self._held[next(iter(self._held))]

    def _copy_into(self, values: Float[np.ndarray, "sequences d"], repeats: Repeats) -> None:
        targets = np.flatnonzero(repeats.copied)
        stored = np.isin(repeats.blocks, list(self._committed))
        for block in np.unique(repeats.blocks[~stored]):
            here = repeats.blocks == block
            values[targets[here]] = self._held[int(block)][repeats.places[here]]
        if stored.any():
            places = zip(repeats.blocks[stored].tolist(), repeats.places[stored].tolist(), strict=True)
            rows = np.array([self._committed[block][place] for block, place in places], np.uint64)
            values[targets[stored]] = self._read(rows, values.shape[1])

    @property
    def _table_path(self) -> str:
        assert self.sink is not None
        return table_path(self.sink.uri, self.sink.table)

    @cached_property
    def _table_rows(self) -> UInt64[np.ndarray, " rows"]:
        """`source_row` of each row that the table had at the first use; rows added since come after them."""
        path = self._table_path
        with storage_errors(path):
            dataset = open_dataset(path)
            if dataset is None:
                raise InputError(f"{path} is absent; pass a --sink.uri that all hosts share")
            return dataset.to_table(columns=["source_row"])["source_row"].to_numpy()

    def _read(self, rows: UInt64[np.ndarray, " copied"], width: int) -> Float[np.ndarray, "copied d"]:
        """Reads vectors from the table; those of rows that were rejected as not finite are NaN."""
        path = self._table_path
        with storage_errors(path):
            dataset = open_dataset(path)
            there = np.isin(rows, self._table_rows)
            wanted, back = np.unique(np.searchsorted(self._table_rows, rows[there]), return_inverse=True)
            found = None if dataset is None else dataset.take(wanted.tolist(), columns=["source_row", "vector"])
        same = found is not None and np.array_equal(found["source_row"].to_numpy()[back], rows[there])
        if found is None or not same or not self._were_rejected(rows[~there]):
            raise InputError(f"{path} was altered during this run; run the same command again")
        stored = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
        vectors = np.full((len(rows), width), np.nan, stored.dtype)
        vectors[there] = stored[back]
        return vectors

    def _were_rejected(self, rows: UInt64[np.ndarray, " missing"]) -> bool:
        if not len(rows):
            return True
        assert self.sink is not None
        path = table_path(self.sink.uri, f"{self.sink.table}_rejects")
        with storage_errors(path):
            rejects = open_dataset(path)
            found = None if rejects is None else rejects.to_table(["source_row"], filter=f"reason = '{NOT_FINITE}'")
        return found is not None and bool(np.isin(rows, found["source_row"].to_numpy()).all())


def window_blocks(embed: config.EmbedConfig, block_rows: int) -> int:
    """Returns how many blocks are remembered: as many as `cache_rows` rows fill."""
    return embed.cache_rows // block_rows if embed.deduplicate else 0


def digests(views: Views, sequences: int) -> list[bytes]:
    """Hashes the token ids of each sequence's views to 128 bits (BLAKE2b, RFC 7693).

    The probability that any two of n different sequences share a digest is n^2 / 2^129: 10^-21 for 10^9 sequences.

    Args:
        views: The views; each starts with CLS, so that joining the ids of a sequence's views is unambiguous.
        sequences: Number of sequences; each has at least one view.
    """
    first = views.tokens.offsets[np.searchsorted(views.owner, np.arange(sequences + 1))]
    data = memoryview(views.tokens.ids.tobytes())
    bounds = (first * views.tokens.ids.itemsize).tolist()
    return [
        hashlib.blake2b(data[start:stop], digest_size=_DIGEST_BYTES).digest()
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def fresh_views(views: Views, copied: Bool[np.ndarray, " sequences"]) -> Views:
    """Returns the views of the sequences that are not copied; `owner` counts these from 0."""
    if not copied.any():
        return views
    keep = ~copied[views.owner]
    lengths = views.tokens.lengths
    tokens = TokenRows(views.tokens.ids[np.repeat(keep, lengths)], np.concatenate([[0], np.cumsum(lengths[keep])]))
    return Views(tokens, (np.cumsum(~copied) - 1)[views.owner[keep]], views.overlong[~copied])


def first_rows(encoded: EncodedBlock) -> UInt64[np.ndarray, " sequences"]:
    """Returns the `source_row` of the first row with each of a block's sequences."""
    first = np.unique(encoded.sequence_of, return_index=True)[1]
    return (encoded.kept[first] + encoded.block.first_row).astype(np.uint64)
