"""A vector table as a reference library: what made its vectors, which rows may be matched, their lineages."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt64

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.labels import name_codes
from bioscan_jax.barcodes.lineage import RANKS, coded_lineages, lineage_columns, missing_lineages
from bioscan_jax.embedding.encoder import unit
from bioscan_jax.errors import InputError
from bioscan_jax.table.reading import check_condition, open_existing, schema_metadata, take_rows
from bioscan_jax.table.storage import lance_text, storage_errors

if TYPE_CHECKING:
    import lance

_BLOCK_ROWS = 8192
_KEPT_BYTES = 1 << 28
_WITHIN = np.uint64((1 << 32) - 1)
_DIGEST = np.dtype("S16")
_LINEAGE_ROWS = 1 << 20
"""Rows whose lineages are compared at a time."""


@dataclass(frozen=True, eq=False)
class Reference:
    """One version of a vector table."""

    dataset: "lance.LanceDataset"
    facts: dict[str, str]
    """The table's metadata, which records what made its vectors."""
    filter: str | None
    """SQL condition for rows that may be matched."""
    chosen: Int64[np.ndarray, " chosen"]
    """Positions of the rows that pass the filter, ascending."""

    @property
    def plan(self) -> dict[str, Any]:
        """The settings that determined the table's vectors."""
        return json.loads(self.facts["plan_facts"])

    @property
    def sequence_column(self) -> str:
        """Name of the table's column with the DNA."""
        return self.plan["data"]["sequence_column"]

    @cached_property
    def lineages(self) -> tuple[pa.DictionaryArray, ...]:
        """Known names of all rows, one array of codes and names per rank.

        Raises:
            InputError: The table has no labels.
        """
        names = self.dataset.schema.names
        wanted = lineage_columns(names)
        if not wanted:
            raise missing_lineages([name for name in names if name != "vector"])
        scanner = self.dataset.scanner(columns=wanted, scan_in_order=True)
        with storage_errors(self.dataset.uri):
            return coded_lineages(scanner.to_batches(), locate=lambda row: f"{self.dataset.uri} row {row}")

    @cached_property
    def ids(self) -> pa.Array:
        """Ids of the rows that may be matched."""
        with storage_errors(self.dataset.uri):
            return (
                self.dataset.to_table(columns=["sequence_id"], filter=self.filter)[0].cast(pa.string()).combine_chunks()
            )

    @cached_property
    def copies(self) -> "Copies":
        """Which rows hold the same DNA."""
        first = np.full(self.dataset.count_rows(), -1, np.int64)
        if self.sequence_column not in self.dataset.schema.names:
            first[self.chosen] = self.chosen
            return Copies(np.empty(0, _DIGEST), first)
        digests, done = np.empty(len(self.chosen), _DIGEST), 0
        scanner = self.dataset.scanner(
            columns=[self.sequence_column], filter=self.filter, batch_size=_BLOCK_ROWS, scan_in_order=True
        )
        with storage_errors(self.dataset.uri):
            for batch in scanner.to_batches():
                digests[done : done + len(batch)] = sequence_digests(clean(batch[0]).sequences.to_pylist())
                done += len(batch)
        halves = digests.view(">u8").reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal digests the first row comes first
        digests = digests[order]
        begins = np.append(True, digests[1:] != digests[:-1])
        first[self.chosen[order]] = self.chosen[order[begins]][np.cumsum(begins) - 1]
        return Copies(digests[begins], first)

    @cached_property
    def addresses(self) -> "RowAddresses":
        """Converts Lance's row addresses to positions in the table."""
        return RowAddresses.of(self.dataset)

    def blocks(
        self, *, copies: bool = True
    ) -> Iterator[tuple[Int64[np.ndarray, " some"], Float32[np.ndarray, "some hidden"]]]:
        """Yields positions and unit vectors of the chosen rows, in batches; of rows with the same DNA the first alone.

        Vectors that fit into `_KEPT_BYTES` are read once.

        Args:
            copies: Yield all rows with the same DNA, too.
        """
        if copies in self._kept:
            yield from self._kept[copies]
            return
        first, kept = 0, []
        scanner = self.dataset.scanner(
            columns=["vector"], filter=self.filter, batch_size=_BLOCK_ROWS, scan_in_order=True
        )
        with storage_errors(self.dataset.uri):
            for batch in scanner.to_batches():
                vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
                rows, vectors = self.chosen[first : first + len(batch)], vectors.reshape(len(batch), -1)
                keep = slice(None) if copies else self.copies.first[rows] == rows
                kept.append((rows[keep], unit(vectors[keep])))
                yield kept[-1]
                first += len(batch)
                if first * vectors.itemsize * vectors.shape[1] > _KEPT_BYTES:
                    kept.clear()
        if sum(len(rows) for rows, _ in kept) == (len(self.chosen) if copies else self.copies.distinct):
            self._kept[copies] = kept

    @cached_property
    def _kept(self) -> dict[bool, list[tuple[np.ndarray, np.ndarray]]]:
        """The blocks with and without copies, once they are read."""
        return {}

    def take(self, rows: Int64[np.ndarray, " some"], column: str) -> pa.Array:
        """Returns one column of some rows, in their order."""
        return take_rows(self.dataset, rows, [column])[column].combine_chunks()

    def sequences(self, rows: Int64[np.ndarray, " some"]) -> list[str]:
        """Returns the DNA of some rows.

        Raises:
            InputError: The table has no DNA.
        """
        if self.sequence_column not in self.dataset.schema.names:
            raise InputError(
                f"{self.dataset.uri} has no column {self.sequence_column!r} with the DNA to align with; "
                "pass --rerank none"
            )
        return self.take(rows, self.sequence_column).cast(pa.string()).to_pylist()


@dataclass(frozen=True, eq=False)
class Copies:
    """Which rows of a reference hold the same cleaned DNA; without DNA in the table, every row is its own."""

    digests: np.ndarray
    """The distinct sequences as `sequence_digests`, ascending; empty without DNA."""
    first: Int64[np.ndarray, " rows"]
    """Position of the first row with the DNA of a row; -1 of rows that may not be matched."""

    @cached_property
    def distinct(self) -> int:
        """Number of distinct sequences."""
        return int((self.first == np.arange(len(self.first))).sum())

    def have(self, texts: Sequence[str]) -> Bool[np.ndarray, " texts"]:
        """Returns which cleaned sequences a row that may be matched has."""
        wanted = sequence_digests(texts)
        if not len(self.digests):
            return np.zeros(len(wanted), bool)
        return self.digests[np.searchsorted(self.digests, wanted).clip(max=len(self.digests) - 1)] == wanted


def sequence_digests(texts: Sequence[str]) -> np.ndarray:
    """Hashes cleaned DNA to 128 bits (BLAKE2b): n sequences have an equal pair by chance with probability n^2 / 2^129."""
    return np.array([hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts], _DIGEST)


@dataclass(frozen=True, eq=False)
class RowAddresses:
    """Positions in a table of rows given by Lance's addresses: the fragment's number << 32, plus the row within it.

    Memory and preparation grow with fragments, and with the rows of those from which rows were deleted.
    """

    fragments: Int64[np.ndarray, " fragments"]
    """Numbers of the fragments, ascending."""
    firsts: Int64[np.ndarray, " fragments"]
    """Position of the first row of each."""
    remaining: dict[int, UInt64[np.ndarray, " rows"]]
    """Addresses of the rows that are left, for each fragment with deletions."""

    @staticmethod
    def of(dataset: "lance.LanceDataset") -> "RowAddresses":
        """Reads the layout of one version of a table."""
        parts = [(fragment, fragment.metadata) for fragment in dataset.get_fragments()]
        numbers = np.array([metadata.id for _, metadata in parts], np.int64)
        rows = np.array([metadata.num_rows for _, metadata in parts], np.int64)
        order = np.argsort(numbers)
        remaining = {
            metadata.id: fragment.to_table(columns=[], with_row_address=True)["_rowaddr"].to_numpy()
            for fragment, metadata in parts
            if metadata.num_deletions
        }
        return RowAddresses(numbers[order], (np.cumsum(rows) - rows)[order], remaining)

    def positions(self, addresses: UInt64[np.ndarray, " found"]) -> Int64[np.ndarray, " found"]:
        """Returns the table positions of rows that are in the table."""
        numbers, within = (addresses >> np.uint64(32)).astype(np.int64), (addresses & _WITHIN).astype(np.int64)
        for number in self.remaining.keys() & set(np.unique(numbers).tolist()) if self.remaining else ():
            here = numbers == number
            within[here] = np.searchsorted(self.remaining[number], addresses[here])
        return self.firsts[np.searchsorted(self.fragments, numbers)] + within


@dataclass(frozen=True, eq=False)
class Taxa:
    """Names coded as integers, rank by rank, and the lineages of each distinct sequence of the reference."""

    names: tuple[pa.Array, ...]
    """Names of each rank; a code is an index into them."""
    lineages: Int32[np.ndarray, "lineages 7"]
    """Codes of the distinct lineages of each sequence, -1 where unknown; see `fill_gaps`."""
    shares: Float64[np.ndarray, "lineages 7"]
    """Share of its sequence's vote that a lineage has at each rank: equal for all names that the sequence has there,
    however many copies have them."""
    first: Int64[np.ndarray, " more"]
    """Where the lineages of each row begin, and where those of the last one end; copies after the first have none."""
    of_reference: tuple[pa.Array, ...]
    """Names among the rows that may be matched; `names` may hold more, which only a head predicts."""

    @staticmethod
    def of(reference: Reference, more: tuple[tuple[str, ...], ...] = ((),) * len(RANKS)) -> "Taxa":
        """Codes the names of the rows that may be matched, and those that a head predicts."""
        lineages, chosen = reference.lineages, pa.array(reference.chosen)
        own = tuple(c.dictionary.take(c.indices.take(chosen).drop_null().unique()) for c in lineages)
        names = tuple(
            pa.concat_arrays([column, pa.array(known, pa.string())]).unique().sort()
            for column, known in zip(own, more, strict=True)
        )
        code_of = [
            np.append(name_codes(c.dictionary, known), np.int32(-1)) for c, known in zip(lineages, names, strict=True)
        ]

        def codes(rows: Int64[np.ndarray, " some"]) -> Int32[np.ndarray, "some 7"]:
            places = [c.indices.take(pa.array(rows)).fill_null(len(c.dictionary)).to_numpy() for c in lineages]
            return np.stack([known[here] for known, here in zip(code_of, places, strict=True)], axis=1)

        rows = reference.chosen
        distinct, lineage_of = _distinct(
            codes(rows[at : at + _LINEAGE_ROWS]) for at in range(0, len(rows), _LINEAGE_ROWS)
        )
        filled, again = _unique_rows(fill_gaps(distinct))
        lineage_of = again[lineage_of]
        first = reference.copies.first
        return Taxa(names, *_lineages_of_sequences(filled, lineage_of, first[rows], len(first)), own)

    def voters(
        self, rows: Int64[np.ndarray, "queries candidates"]
    ) -> tuple[Int64[np.ndarray, "queries voters"], Int64[np.ndarray, "queries voters"]]:
        """Lists the lineages of candidates: the place of the candidate and the lineage's index; -1 past the last."""
        count = np.where(rows >= 0, self.first[rows + 1] - self.first[rows], 0)
        total, cell = count.sum(axis=1), np.repeat(np.arange(rows.size), count.reshape(-1))
        query, candidate = np.divmod(cell, max(rows.shape[1], 1))
        before, before_query = np.cumsum(count) - count.reshape(-1), np.cumsum(total) - total
        within = np.arange(len(cell))
        places = np.full((len(rows), total.max(initial=0)), -1, np.int64)
        found = places.copy()
        places[query, within - before_query[query]] = candidate
        found[query, within - before_query[query]] = self.first[rows.reshape(-1)[cell]] + within - before[cell]
        return places, found

    def truth(self, lineages: tuple[pa.Array, ...]) -> Int32[np.ndarray, "rows 7"]:
        """Codes the names of labelled rows: -1 where unknown, -2 where no row of the reference has the name."""
        found = []
        for column, names, own in zip(lineages, self.names, self.of_reference, strict=True):
            there = name_codes(column, own) >= 0
            missing = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, -2)
            found.append(np.where(there, name_codes(column, names), missing))
        return np.stack(found, axis=1).astype(np.int32)


def _distinct(
    blocks: Iterable[Int32[np.ndarray, "_ 7"]],
) -> tuple[Int32[np.ndarray, "lineages 7"], Int32[np.ndarray, " rows"]]:
    """Returns the distinct lineages, ascending, and which of them each row has; sorts a block of rows at a time."""
    found, places, seen = [], [], 0
    for block in blocks:
        one, place = _unique_rows(block)
        found.append(one)
        places.append(place + np.int32(seen))
        seen += len(one)
    distinct, place = _unique_rows(np.concatenate(found))
    return distinct, place[np.concatenate(places)]


def _unique_rows(
    rows: Int32[np.ndarray, "rows 7"],
) -> tuple[Int32[np.ndarray, "lineages 7"], Int32[np.ndarray, " rows"]]:
    """Returns the distinct rows of codes from -1 on, ascending, and where each row is among them.

    The codes of a row become one integer, which sorts faster than rows do.
    """
    key, size = np.zeros(len(rows), np.int64), 1
    for column in rows.T:
        width = int(column.max(initial=-1)) + 2
        if size > (1 << 62) // width:
            values, key = np.unique(key, return_inverse=True)
            size = len(values)
        key, size = key * width + (column + 1), size * width
    _, first, place = np.unique(key, return_index=True, return_inverse=True)
    return rows[first], place.astype(np.int32)


def _lineages_of_sequences(
    distinct: Int32[np.ndarray, "distinct 7"],
    lineage_of: Int32[np.ndarray, " chosen"],
    sequence_of: Int64[np.ndarray, " chosen"],
    rows: int,
) -> tuple[Int32[np.ndarray, "lineages 7"], Float64[np.ndarray, "lineages 7"], Int64[np.ndarray, " more"]]:
    """Returns the fields of `Taxa`: lineages, shares and where each row's begin.

    Args:
        distinct: Codes of the distinct lineages, ascending.
        lineage_of: Which of them each row has that may be matched.
        sequence_of: Position of the first row with its DNA.
        rows: Rows of the table.
    """
    found, copies = np.unique(sequence_of * len(distinct) + lineage_of, return_counts=True)
    sequence, lineage = np.divmod(found, len(distinct))
    order = np.lexsort((-copies, sequence))  # of names with equal votes, the one with most copies comes first
    sequence, lineages = sequence[order], distinct[lineage[order]]
    shares = np.zeros(lineages.shape)
    for rank in range(lineages.shape[1]):
        named = np.flatnonzero(lineages[:, rank] >= 0)
        most = lineages[:, rank].max(initial=0) + np.int64(1)
        names, of, lines = np.unique(
            sequence[named] * most + lineages[named, rank], return_inverse=True, return_counts=True
        )
        _, place, taxa = np.unique(names // most, return_inverse=True, return_counts=True)
        shares[named, rank] = (1 / (lines * taxa[place]))[of]
    return lineages, shares, np.searchsorted(sequence, np.arange(rows + 1))


def fill_gaps(lineages: Int32[np.ndarray, "lineages 7"]) -> Int32[np.ndarray, "lineages 7"]:
    """Fills blank ranks above a name from lineages that agree on all its names and have more.

    A gap stays where no lineage has more names, or two that have the most disagree.

    Args:
        lineages: Codes of the taxa of each distinct lineage, -1 where unknown.

    Example:
        >>> full, gap, other = [0, 0, 0, 4, 5, 6, 7], [0, 0, 0, -1, -1, 6, 7], [0, 0, 0, -1, -1, 6, 8]
        >>> fill_gaps(np.array([full, gap, other], np.int32)).tolist() == [full, full, other]
        True
    """
    last = lineages.shape[1] - 1 - (lineages[:, ::-1] >= 0).argmax(axis=1)
    gaps = ((np.arange(lineages.shape[1]) < last[:, None]) & (lineages < 0)).any(axis=1) & (lineages >= 0).any(axis=1)
    if not gaps.any():
        return lineages
    wanted = {(int(rank), int(lineages[row, rank])) for row, rank in zip(np.flatnonzero(gaps), last[gaps], strict=True)}
    holders: dict[tuple[int, int], list[int]] = {}
    for rank in {rank for rank, _ in wanted}:
        sought = np.array([name for at, name in wanted if at == rank])
        for row in np.flatnonzero(np.isin(lineages[:, rank], sought)).tolist():
            holders.setdefault((rank, int(lineages[row, rank])), []).append(row)
    filled = lineages.copy()
    for row in np.flatnonzero(gaps):
        lineage, end = lineages[row], int(last[row]) + 1
        known = np.flatnonzero(lineage >= 0)
        others = lineages[holders[end - 1, int(lineage[end - 1])], :end]
        others = others[(others[:, known] == lineage[known]).all(axis=1)]
        names = (others >= 0).sum(axis=1)
        most = np.unique(others[names == names.max()], axis=0)
        if len(most) == 1:
            filled[row, :end] = most[0]
    return filled


def open_reference(given: config.ReferenceConfig, condition: str | None = None) -> Reference:
    """Opens a table of vectors.

    Args:
        given: Where the table is.
        condition: SQL on its columns: which rows may be matched; all if None.

    Raises:
        InputError: There is no such table, it has no vectors or no record of what made them, or the filter is invalid
            or matches no row.
    """
    dataset = open_existing(given.uri, given.table)
    facts = schema_metadata(dataset)
    vectors = "vector" in dataset.schema.names and pa.types.is_fixed_size_list(dataset.schema.field("vector").type)
    if not vectors or not {"plan", "plan_facts", "weights_sha256"} <= facts.keys():
        raise InputError(
            f"{dataset.uri} is not a table of vectors with a record of what made them; pass one that embed made"
        )
    if condition is None:
        rows = dataset.count_rows()
        if not rows:
            raise InputError(f"{dataset.uri} has no vectors; embed the reference again")
        return Reference(dataset, facts, None, np.arange(rows, dtype=np.int64))
    condition = check_condition(condition)
    try:
        found = dataset.to_table(columns=[], filter=condition, with_row_address=True)["_rowaddr"].to_numpy()
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(
            f"--filter {condition!r} is not a condition on the table's columns ({', '.join(dataset.schema.names)}): {lance_text(error)}"
        ) from error
    if not len(found):
        raise InputError(f"--filter {condition!r} matches no row of {dataset.uri}; pass a wider one")
    return Reference(dataset, facts, condition, np.sort(RowAddresses.of(dataset).positions(found)))
