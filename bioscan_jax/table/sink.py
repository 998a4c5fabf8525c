"""The Lance table that holds every input row exactly once: ordered blocks, or parts of them, one atomic commit each.

A killed run resumes from the table itself, at whatever instant it was killed. Power cuts are not covered: Lance does
not force its files to the disk.
"""

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, UInt64

from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory
from bioscan_jax.table.commit import append_files, write_files
from bioscan_jax.table.index import build_indexes
from bioscan_jax.table.lock import Check, writer_lock
from bioscan_jax.table.plan import Plan, check_origin
from bioscan_jax.table.storage import create_dataset, open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance


_COMMITS_BETWEEN_CLEANINGS = 64


@dataclass(frozen=True)
class SinkBlock:
    """The results of one block of input rows: each row is either a vector or a reject."""

    index: int
    """Number of the block, whose first row is `index * block_rows`."""
    vectors: pa.Table
    rejects: pa.Table


@dataclass(frozen=True)
class Finished:
    """A complete table."""

    vectors: int
    rejects: int
    indexes: tuple[str, ...]
    """Each index of the table, as `column: TYPE`."""
    notes: tuple[str, ...]
    """What was requested but not done, and why."""


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Casts a block to the schema's column order and types; vectors must already have the right type."""
    if set(table.column_names) != set(schema.names) or table.num_columns != len(schema):
        raise ValueError(f"a block has columns {table.column_names}; the table has {schema.names}")
    if "vector" in schema.names and table.schema.field("vector").type != schema.field("vector").type:
        wrong, right = table.schema.field("vector").type, schema.field("vector").type
        raise ValueError(f"a block has vectors of type {wrong}; the table has {right}")
    return table.select(schema.names).cast(schema)


def write_fragments(
    uri: str, table: str, data: pa.Table, *, max_bytes_per_file: int, safe_rows: int | None = None
) -> list[str]:
    """Writes vectors from a process that is not the table's writer; they become rows once the writer commits them.

    The writer must have opened the table before, and must commit before it finishes: opening and finishing a table
    remove the files that no commit refers to.

    Args:
        uri: Database directory or object-store URL that all hosts share.
        table: Name of the vector table.
        data: Rows of consecutive blocks, in order of `source_row`.
        max_bytes_per_file: A new file is started past this size.
        safe_rows: Input rows already committed, for the error message; None if not known.

    Returns:
        Each fragment as JSON, for `VectorTable.append_fragments`.

    Raises:
        InputError: The storage failed, or there is no such table.
    """
    path = table_path(uri, table)
    dataset = open_dataset(path)
    if dataset is None:
        raise InputError(f"{path} is absent; pass a --sink.uri that all hosts share")
    conformed = _conform(data, dataset.schema)
    with storage_errors(path, safe_rows):
        return write_files(dataset, conformed, max_bytes_per_file)


def read_vectors(
    uri: str, table: str, fragments: Sequence[str], rows: UInt64[np.ndarray, " wanted"]
) -> tuple[Float[np.ndarray, "found d"], Bool[np.ndarray, " wanted"]]:
    """Reads vectors from fragments that may not be committed yet.

    Args:
        uri: Database directory or object-store URL.
        table: Name of the vector table.
        fragments: Results of `write_fragments`, in order of `source_row`.
        rows: Values of `source_row`, in any order, also repeated.

    Returns:
        The vectors of the rows that are there, in the order of `rows`, and which these are.

    Raises:
        InputError: The storage failed.
    """
    from lance.file import LanceFileReader

    path, found, there = table_path(uri, table), [], np.zeros(len(rows), bool)
    places = np.zeros(len(rows), np.int64)
    with storage_errors(path):
        files = [file["path"] for fragment in fragments for file in json.loads(fragment)["files"]]
        for name in files:
            where = f"{path}/data/{name}"
            held = LanceFileReader(where, columns=["source_row"]).read_all().to_table()["source_row"].to_numpy()
            here = np.isin(rows, held)
            if here.any():
                wanted, back = np.unique(np.searchsorted(held, rows[here]), return_inverse=True)
                taken = LanceFileReader(where, columns=["vector"]).take_rows(wanted.tolist()).to_table()["vector"]
                flat = taken.combine_chunks().flatten().to_numpy()
                places[here] = back + sum(map(len, found))
                there |= here
                found.append(flat.reshape(len(wanted), -1))
    return (np.concatenate(found)[places[there]] if found else np.empty((0, 0), np.float32)), there


class VectorTable:
    """A vector table and its rejects, open for writing under the table's lock; a context manager.

    After an error it must be opened again; it then resumes from what the disk holds.
    """

    def __init__(
        self,
        vectors: "lance.LanceDataset",
        rejects: "lance.LanceDataset",
        *,
        rows: int,
        block_rows: int,
        max_bytes_per_file: int,
        fix: str,
        check: Check,
    ) -> None:
        self._vectors, self._rejects = vectors, rejects
        self._rows, self._block_rows, self._max_bytes_per_file = rows, block_rows, max_bytes_per_file
        self._fix, self._check, self._run = fix, check, uuid.uuid4().hex
        self._commits = 0
        self._held = ExitStack()
        self.safe_rows = self.vectors = self.rejects = 0

    @classmethod
    def open(
        cls,
        uri: str,
        table: str,
        *,
        schema: pa.Schema,
        plan: Plan,
        provenance: dict[str, str],
        rows: int,
        block_rows: int,
        max_bytes_per_file: int,
        lock: Check | None = None,
    ) -> "VectorTable":
        """Locks the table, creates it if absent, and finds the row to resume from.

        Args:
            uri: Database directory or object-store URL.
            table: Name; rejects go to `{table}_rejects`.
            schema: From `vector_schema`.
            plan: What determines the rows and their values.
            provenance: Schema metadata to store in a new table.
            rows: Rows of the input.
            block_rows: Rows of a block; the last may have fewer.
            max_bytes_per_file: A new data file is started past this size, approximately.
            lock: What the table's `writer_lock` yielded, if the caller holds it until the table is closed.

        Raises:
            InputError: Another process is writing the table, it was made by another plan or altered since, or the
                storage failed.
        """
        paths = table_path(uri, table), table_path(uri, f"{table}_rejects")
        fix = f"pass another --sink.table, or remove {paths[0]} and {paths[1]}"
        origin = {"plan": plan.sha256, "plan_facts": plan.canonical, "rows": str(rows), "block_rows": str(block_rows)}
        if taken := provenance.keys() & origin.keys():
            raise ValueError(f"provenance has {sorted(taken)}, which the table writes itself")
        wanted = [columns.with_metadata({**provenance, **origin}) for columns in (schema, REJECTS)]
        with ExitStack() as held:
            check = held.enter_context(writer_lock(uri, table)) if lock is None else lock
            found = [open_dataset(path) for path in paths]
            for path, dataset, columns in zip(paths, found, wanted, strict=True):
                if dataset is not None:
                    check_origin(path, dataset.schema, columns, fix)
            for i, (path, columns) in enumerate(zip(paths, wanted, strict=True)):
                if found[i] is None:
                    with storage_errors(path):
                        found[i] = create_dataset(path, columns)
            sizes = {"rows": rows, "block_rows": block_rows, "max_bytes_per_file": max_bytes_per_file}
            opened = cls(*found, **sizes, fix=fix, check=check)
            with storage_errors(paths[0]):
                opened._resume()
            opened._held = held.pop_all()
        return opened

    def _source_rows(self, dataset: "lance.LanceDataset") -> Iterator[UInt64[np.ndarray, " rows"]]:
        """Yields the input row of each row, batch after batch."""
        last = -1
        for batch in dataset.scanner(columns=["source_row"], scan_in_order=True).to_batches():
            found = batch["source_row"].to_numpy()
            if not len(found):
                continue
            if found[0] <= last or (found[1:] <= found[:-1]).any() or found[-1] >= self._rows:
                raise InputError(f"{dataset.uri}: its rows are not in the order of the input, each once; {self._fix}")
            last = int(found[-1])
            yield found

    def _resume(self) -> None:
        last = -1
        for rows in self._source_rows(self._vectors):
            last, self.vectors = int(rows[-1]), self.vectors + len(rows)
        # The block of the last vector is whole if its last rows are rejects; else the rows up to that vector are safe.
        stop = min((last // self._block_rows + 1) * self._block_rows, self._rows)
        every = whole = part = 0
        for rows in self._source_rows(self._rejects):
            every += len(rows)
            whole, part = whole + int(np.searchsorted(rows, stop)), part + int(np.searchsorted(rows, last + 1))
        if self.vectors + every == self._rows:
            self.safe_rows, kept = self._rows, every
        else:
            self.safe_rows, kept = (stop, whole) if self.vectors + whole == stop else (last + 1, part)
        if self.vectors + kept != self.safe_rows:
            counts = f"{self.vectors} vectors and {kept} rejects for the first {self.safe_rows} rows"
            raise InputError(f"{self._vectors.uri} has {counts}: it was altered by something else; {self._fix}")
        if kept < every:  # their writer was killed before it committed the vectors of the same rows
            self._rejects.delete(f"source_row >= {self.safe_rows}")
        self.rejects = kept
        self._clean()

    def _clean(self) -> None:
        """Removes old versions and the files of killed commits; no other process may be writing."""
        for dataset in (self._vectors, self._rejects):
            dataset.cleanup_old_versions(retain_versions=1, delete_unverified=True, error_if_tagged_old_versions=False)
            if (directory := local_directory(dataset.uri)) is not None:
                for unfinished in [
                    *directory.rglob(".tmp*"),
                    *directory.rglob("*#*"),
                ]:  # manifests, which Lance does not remove
                    unfinished.unlink()

    @property
    def next_block(self) -> int:
        """Number of the block that holds the next row; the number of blocks once the table is finished."""
        return (
            -(-self._rows // self._block_rows) if self.safe_rows == self._rows else self.safe_rows // self._block_rows
        )

    @property
    def finished(self) -> bool:
        """Whether every input row is in the table, as a vector or a reject."""
        return self.vectors + self.rejects == self._rows

    def _span(self, indices: Sequence[int]) -> tuple[int, int]:
        """Returns the first input row of consecutive blocks and the row after their last."""
        if list(indices) != list(range(self.next_block, self.next_block + len(indices))) or not indices:
            raise ValueError(f"blocks {list(indices)} were given where block {self.next_block} comes next")
        if self.safe_rows % self._block_rows:
            raise ValueError(f"block {self.next_block} was given, but row {self.safe_rows}, inside it, comes next")
        return self.safe_rows, min((indices[-1] + 1) * self._block_rows, self._rows)

    def append(self, blocks: Sequence[SinkBlock]) -> None:
        """Commits consecutive blocks from `next_block` on, their vectors in one atomic step.

        Args:
            blocks: Together they hold each row of these blocks once, in order of `source_row`.

        Raises:
            InputError: The storage failed, or a second process is writing.
            ValueError: These are not the next blocks, or their rows or columns do not match the table.
        """
        first, stop = self._span([block.index for block in blocks])
        vectors = pa.concat_tables([_conform(block.vectors, self._vectors.schema) for block in blocks])
        rejects = pa.concat_tables([_conform(block.rejects, self._rejects.schema) for block in blocks])
        parts = vectors["source_row"].to_numpy(), rejects["source_row"].to_numpy()
        ordered = all((part[1:] > part[:-1]).all() for part in parts)
        if not ordered or not np.array_equal(np.sort(np.concatenate(parts)), np.arange(first, stop)):
            raise ValueError(f"the blocks do not hold rows {first} to {stop - 1} once each and in order")
        with storage_errors(self._vectors.uri, self.safe_rows):
            fragments = write_files(self._vectors, vectors, self._max_bytes_per_file)
        self.append_fragments(stop, fragments, vectors.num_rows, rejects)

    def append_fragments(self, stop: int, fragments: Sequence[str], rows: int, rejects: pa.Table) -> None:
        """Commits the input rows from `safe_rows` to `stop`, whose vectors `write_fragments` wrote, on one or more hosts.

        Args:
            stop: The input row after the last one; it may lie inside a block.
            fragments: Results of `write_fragments`, in order of `source_row`.
            rows: Number of vectors in the fragments.
            rejects: Rejected rows among them.

        Raises:
            InputError: The storage failed, or a second process is writing.
            ValueError: There are too few or too many rows.
        """
        first = self.safe_rows
        held = sum(json.loads(fragment)["physical_rows"] for fragment in fragments)
        if held != rows or rows + rejects.num_rows != stop - first:
            given = f"{held} vectors ({rows} announced) and {rejects.num_rows} rejects"
            raise ValueError(f"{given} were given for rows {first} to {stop - 1}")
        conformed = _conform(rejects, self._rejects.schema)
        with storage_errors(self._vectors.uri, first):
            # rejects first: after a kill between the two, opening the table removes them again
            files = write_files(self._rejects, conformed, self._max_bytes_per_file)
            what = {
                "run": self._run,
                "blocks": f"{first // self._block_rows}-{(stop - 1) // self._block_rows}",
                "rows": f"{first}-{stop - 1}",
            }
            self._rejects = append_files(self._rejects, files, what, self._check)
            self._vectors = append_files(self._vectors, fragments, what, self._check)
            self._expect(self.vectors + rows, self.rejects + rejects.num_rows)
            self._commits += 1
            if self._commits % _COMMITS_BETWEEN_CLEANINGS == 0:
                for dataset in (
                    self._vectors,
                    self._rejects,
                ):  # verified versions only: other hosts may have just written files
                    dataset.cleanup_old_versions(retain_versions=1, error_if_tagged_old_versions=False)
        self.vectors += rows
        self.rejects += rejects.num_rows
        self.safe_rows = stop

    def _expect(self, vectors: int, rejects: int) -> None:
        for dataset, expected in ((self._vectors, vectors), (self._rejects, rejects)):
            dataset.checkout_latest()
            if (found := dataset.count_rows()) != expected:
                cause = "a second writer is at work; stop it, then"
                raise InputError(f"{dataset.uri} has {found} rows instead of {expected}: {cause} {self._fix}")

    def finish(self, index: Literal["none", "ivf_sq", "ivf_pq"] = "none") -> Finished:
        """Checks that every input row is in the table, removes old versions and builds missing indexes.

        Args:
            index: Vector index (cosine); `sequence_id` is always indexed.

        Raises:
            InputError: The storage failed, or a second process is writing.
            ValueError: Rows are missing.
        """
        if not self.finished:
            counts = f"{self.vectors} vectors and {self.rejects} rejects"
            raise ValueError(f"{self._vectors.uri} has {counts} of {self._rows} rows and cannot be finished")
        with storage_errors(self._vectors.uri, self._rows):
            self._expect(self.vectors, self.rejects)
            present = np.zeros(self._rows, bool)
            for rows in itertools.chain(self._source_rows(self._vectors), self._source_rows(self._rejects)):
                present[rows] = True
            if not present.all():
                missing = int(np.argmin(present))
                raise InputError(f"{self._vectors.uri} lacks row {missing} and has another twice; {self._fix}")
            indexes, notes = build_indexes(self._vectors, index)
            self._clean()
        return Finished(self.vectors, self.rejects, indexes, notes)

    def fragments_of(self, first: int, stop: int) -> list[str]:
        """Returns the committed fragments that hold some of the last input rows, from `first` to `stop`, in order."""
        found: list[str] = []
        for fragment in reversed(self._vectors.get_fragments()):
            rows = fragment.to_table(columns=["source_row"])["source_row"].to_numpy()
            if len(rows) and rows[0] < stop and rows[-1] >= first:
                found.append(json.dumps(fragment.metadata.to_json()))
            if len(rows) and rows[0] <= first:
                break
        return found[::-1]

    def rejected_rows(self, reason: str, first: int) -> UInt64[np.ndarray, " rows"]:
        """Returns the input rows, from `first` on, that were rejected for a reason."""
        wanted = f"reason = '{reason}' AND source_row >= {first}"
        return self._rejects.to_table(["source_row"], filter=wanted)["source_row"].to_numpy()

    def count_rejects(self, reason: str) -> int:
        """Returns how many rows were rejected for a reason."""
        return self._rejects.count_rows(filter=f"reason = '{reason}'")

    def close(self) -> None:
        """Releases the lock."""
        self._held.close()

    def __enter__(self) -> "VectorTable":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
