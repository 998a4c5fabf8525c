"""Sequences that were embedded a few blocks ago: their vectors are copied, not computed again.

What is copied depends on the input alone: a sequence is if one of the last blocks has it, since all its occurrences
there have one and the same vector. After a restart those blocks are read again, and their vectors are those in the
table. So a run that was stopped gives, to the last bit, what it would have given.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.views import Views
from bioscan_jax.data.encode import EncodedBlock
from bioscan_jax.errors import InputError
from bioscan_jax.table.storage import open_dataset, storage_errors, table_path

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Repeats:
    """Which sequences of a block an earlier block has, and where."""

    copied: Bool[np.ndarray, " sequences"]
    blocks: Int[np.ndarray, " copied"]
    """The earlier block of each copied sequence."""
    places: Int[np.ndarray, " copied"]
    """Its index among that block's sequences."""

    @classmethod
    def none(cls, sequences: int) -> "Repeats":
        """No sequence of the block is copied."""
        return cls(np.zeros(sequences, bool), np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class Window:
    """The digests of the last blocks; `see` must be called for one block after another."""

    blocks: int
    """How many blocks are remembered."""
    _latest: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    _seen: dict[int, Sequence[bytes]] = field(default_factory=dict)

    def see(self, index: int, digests: Sequence[bytes]) -> Repeats:
        """Looks a block's sequences up among the last blocks', and remembers them."""
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
class Known:
    """The vectors of the last blocks, as they are stored."""

    sink: config.SinkConfig
    blocks: int
    """How many blocks are kept."""
    _held: dict[int, Float[np.ndarray, "sequences d"]] = field(default_factory=dict)
    _committed: dict[int, UInt64[np.ndarray, " sequences"]] = field(default_factory=dict)

    def committed(self, index: int, source_rows: UInt64[np.ndarray, " sequences"]) -> None:
        """Remembers where the table has the vectors of a block that an earlier run committed."""
        self._committed[index] = source_rows

    def keep(self, index: int, values: Float[np.ndarray, "sequences d"]) -> None:
        """Keeps the vectors of a block's sequences, and lets the oldest go."""
        if self.blocks:
            self._held[index] = values
        if len(self._held) > self.blocks:
            del self._held[next(iter(self._held))]

    def copy_into(self, values: Float[np.ndarray, "sequences d"], repeats: Repeats) -> None:
        """Fills in the vectors of the copied sequences.

        Raises:
            InputError: The table, which holds those of an earlier run, cannot be read or was altered.
        """
        targets = np.flatnonzero(repeats.copied)
        stored = np.isin(repeats.blocks, list(self._committed))
        for block in np.unique(repeats.blocks[~stored]):
            here = repeats.blocks == block
            values[targets[here]] = self._held[int(block)][repeats.places[here]]
        if stored.any():
            places = zip(repeats.blocks[stored].tolist(), repeats.places[stored].tolist(), strict=True)
            rows = np.array([self._committed[block][place] for block, place in places], np.uint64)
            values[targets[stored]] = self._read(rows, values.shape[1])

    @cached_property
    def _table_rows(self) -> UInt64[np.ndarray, " rows"]:
        """`source_row` of each row of the table when it was first needed; later rows are appended."""
        path = table_path(self.sink.uri, self.sink.table)
        with storage_errors(path):
            dataset = open_dataset(path)
            if dataset is None:
                raise InputError(f"{path} is absent; pass a --sink.uri that all hosts share")
            return dataset.to_table(columns=["source_row"])["source_row"].to_numpy()

    def _read(self, rows: UInt64[np.ndarray, " copied"], width: int) -> Float[np.ndarray, "copied d"]:
        path = table_path(self.sink.uri, self.sink.table)
        with storage_errors(path):
            dataset = open_dataset(path)
            positions = np.minimum(np.searchsorted(self._table_rows, rows), len(self._table_rows) - 1)
            wanted, back = np.unique(positions, return_inverse=True)
            found = None if dataset is None else dataset.take(wanted.tolist(), columns=["source_row", "vector"])
        if found is None or not np.array_equal(found["source_row"].to_numpy()[back], rows):
            raise InputError(f"{path} was altered while this run went on; run the same command again")
        return found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)[back]


def window_blocks(embed: config.EmbedConfig, block_rows: int) -> int:
    """Blocks whose sequences are remembered: those that `cache_rows` rows fill."""
    return embed.cache_rows // block_rows if embed.deduplicate else 0


def digests(views: Views, sequences: int) -> list[bytes]:
    """128 bits for each sequence that tell it from all others, by the ids of its views.

    Different ones among n sequences share theirs by chance with a probability of n^2 / 2^129 (BLAKE2b, RFC 7693): for
    10^9 sequences 10^-21.

    Args:
        views: Of the sequences; each view starts with CLS, so that their ids one after another tell them apart.
        sequences: Their number; each has at least one view.
    """
    first = views.tokens.offsets[np.searchsorted(views.owner, np.arange(sequences + 1))]
    data = memoryview(views.tokens.ids.tobytes())
    bounds = (first * views.tokens.ids.itemsize).tolist()
    return [
        hashlib.blake2b(data[start:stop], digest_size=_DIGEST_BYTES).digest()
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def fresh_views(views: Views, copied: Bool[np.ndarray, " sequences"]) -> Views:
    """The views of the sequences that are not copied, their owners counted from 0."""
    if not copied.any():
        return views
    keep = ~copied[views.owner]
    lengths = views.tokens.lengths
    tokens = TokenRows(views.tokens.ids[np.repeat(keep, lengths)], np.concatenate([[0], np.cumsum(lengths[keep])]))
    return Views(tokens, (np.cumsum(~copied) - 1)[views.owner[keep]], views.overlong[~copied])


def first_rows(encoded: EncodedBlock) -> UInt64[np.ndarray, " sequences"]:
    """`source_row` of the first row of each of a block's sequences."""
    first = np.unique(encoded.sequence_of, return_index=True)[1]
    return (encoded.kept[first] + encoded.block.first_row).astype(np.uint64)
