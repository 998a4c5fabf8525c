"""The exactly-once Lance table: blocks of rows in a fixed order, one atomic commit each, resumed from itself.

The kernel may kill the process at any instant; what a power cut does to unwritten pages is the disk's affair.
"""

import errno
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import UInt64

from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.errors import InputError
from bioscan_jax.table.index import build_indexes
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.plan import Plan, check_origin
from bioscan_jax.table.storage import local_directory, open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance


_COMMITS_BETWEEN_CLEANINGS = 64


@dataclass(frozen=True)
class SinkBlock:
    """What became of one block of input rows: each is a vector or a reject."""

    index: int
    """Number of the block; it holds the rows from `index * block_rows`."""
    vectors: pa.Table
    rejects: pa.Table


@dataclass(frozen=True)
class Finished:
    """A complete table."""

    vectors: int
    rejects: int
    indexes: tuple[str, ...]
    """`column: TYPE` of each index the table has."""
    notes: tuple[str, ...]
    """What was asked for and not done, and why."""


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns in the schema's order and types; the vectors themselves must have their type already."""
    if set(table.column_names) != set(schema.names) or table.num_columns != len(schema):
        raise ValueError(f"a block has columns {table.column_names}; the table has {schema.names}")
    if "vector" in schema.names and table.schema.field("vector").type != schema.field("vector").type:
        wrong, right = table.schema.field("vector").type, schema.field("vector").type
        raise ValueError(f"a block has vectors of type {wrong}; the table has {right}")
    return table.select(schema.names).cast(schema)


def _write(dataset: "lance.LanceDataset", data: pa.Table, max_bytes_per_file: int) -> list[str]:
    """Writes data files that no version of the table names yet."""
    from lance.fragment import write_fragments

    if not data.num_rows:
        return []
    # Lance looks at the size of a file between batches only, and a block is one batch
    batch_rows = max(1, data.num_rows * max_bytes_per_file // (16 * data.nbytes))
    batches = data.to_reader(max_chunksize=batch_rows)
    fragments = write_fragments(batches, dataset, max_bytes_per_file=max_bytes_per_file)
    for file in [file for fragment in fragments for file in fragment.files]:
        _check_whole(f"{dataset.uri}/data/{file.path}", file.file_size_bytes)
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def _check_whole(path: str, size: int | None) -> None:
    """Raises OSError where a local file is short: Lance says nothing if the disk fills up while it writes the end."""
    local = local_directory(path)
    if local is not None and (found := local.stat().st_size) != size:
        raise OSError(
            errno.ENOSPC, f"only {found} of {size} bytes could be written to {path}; ulimit -f also bounds it"
        )


def _commit(dataset: "lance.LanceDataset", fragments: Sequence[str]) -> "lance.LanceDataset":
    """Makes written files part of the table, all of them or none."""
    import lance

    if not fragments:
        return dataset
    append = lance.LanceOperation.Append([lance.FragmentMetadata.from_json(fragment) for fragment in fragments])
    return lance.LanceDataset.commit(dataset, append, read_version=dataset.version)


def write_fragments(
    uri: str, table: str, data: pa.Table, *, max_bytes_per_file: int, safe_rows: int | None = None
) -> list[str]:
    """Writes vectors from a process that is not the table's writer; they count once the writer commits them.

    The writer must have opened the table before, and must have committed before it finishes: opening and
    finishing remove the files that no commit names.

    Args:
        uri: Database directory or object-store URL that all hosts share.
        table: Name of the vector table.
        data: Rows of consecutive blocks, in order of `source_row`.
        max_bytes_per_file: A new file is begun past this size.
        safe_rows: Input rows that are committed, for the message if this fails; None if not known.

    Returns:
        JSON of each fragment, for `VectorTable.append_fragments`.

    Raises:
        InputError: the storage failed, or the table is absent.
    """
    path = table_path(uri, table)
    dataset = open_dataset(path)
    if dataset is None:
        raise InputError(f"{path} is absent; pass a --sink.uri that all hosts share")
    conformed = _conform(data, dataset.schema)
    with storage_errors(path, safe_rows):
        return _write(dataset, conformed, max_bytes_per_file)


class VectorTable:
    """A vector table and its rejects, held under the table's lock: use it as a context manager.

    After an error it must be opened again; what is on the disk then decides where it goes on.
    """

    def __init__(
        self,
        vectors: "lance.LanceDataset",
        rejects: "lance.LanceDataset",
        *,
        rows: int,
        block_rows: int,
        max_bytes_per_file: int,
        mend: str,
    ) -> None:
        self._vectors, self._rejects = vectors, rejects
        self._rows, self._block_rows, self._max_bytes_per_file = rows, block_rows, max_bytes_per_file
        self._mend = mend
        self._commits = 0
        self._held = ExitStack()
        self.next_block = self.vectors = self.rejects = 0

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
        locked: bool = False,
    ) -> "VectorTable":
        """Locks the table, makes it if it is absent, and finds where to go on.

        Args:
            uri: Database directory or object-store URL.
            table: Name; rejects go to `{table}_rejects`.
            schema: From `vector_schema`.
            plan: What decides the rows and their values.
            provenance: Schema metadata to keep with the table when it is made.
            rows: Rows of the input.
            block_rows: Rows of a block; the last may have fewer.
            max_bytes_per_file: A new data file is begun past this size; soft.
            locked: The caller holds the table's `writer_lock` and keeps it until the table is closed.

        Raises:
            InputError: another process writes the table, it was made by another plan or altered since, or the
                storage failed.
        """
        import lance

        paths = table_path(uri, table), table_path(uri, f"{table}_rejects")
        mend = f"pass another --sink.table, or remove {paths[0]} and {paths[1]}"
        origin = {"plan": plan.sha256, "plan_facts": plan.canonical, "rows": str(rows), "block_rows": str(block_rows)}
        if taken := provenance.keys() & origin.keys():
            raise ValueError(f"provenance has {sorted(taken)}, which the table writes itself")
        wanted = [columns.with_metadata({**provenance, **origin}) for columns in (schema, REJECTS)]
        with ExitStack() as held:
            if not locked:
                held.enter_context(writer_lock(uri, table))
            found = [open_dataset(path) for path in paths]
            for path, dataset, columns in zip(paths, found, wanted, strict=True):
                if dataset is not None:
                    check_origin(path, dataset.schema, columns, mend)
            for i, (path, columns) in enumerate(zip(paths, wanted, strict=True)):
                if found[i] is None:
                    with storage_errors(path):
                        found[i] = lance.write_dataset(columns.empty_table(), path, mode="create")
            opened = cls(*found, rows=rows, block_rows=block_rows, max_bytes_per_file=max_bytes_per_file, mend=mend)
            with storage_errors(paths[0]):
                opened._resume()
            opened._held = held.pop_all()
        return opened

    def _source_rows(self, dataset: "lance.LanceDataset") -> UInt64[np.ndarray, " rows"]:
        found = dataset.to_table(columns=["source_row"])["source_row"].to_numpy()
        if (found[1:] <= found[:-1]).any() or (found[-1:] >= self._rows).any():
            raise InputError(f"{dataset.uri}: its rows are not in the order of the input, each once; {self._mend}")
        return found

    def _resume(self) -> None:
        vectors, rejects = self._source_rows(self._vectors), self._source_rows(self._rejects)
        if len(vectors) + len(rejects) == self._rows:
            self.next_block, kept = -(-self._rows // self._block_rows), len(rejects)
        else:
            self.next_block = int(vectors[-1]) // self._block_rows + 1 if len(vectors) else 0
            kept = int(np.searchsorted(rejects, self._safe_rows))
            if len(vectors) + kept != self._safe_rows:
                counts = f"{len(vectors)} vectors and {kept} rejects for the first {self._safe_rows} rows"
                raise InputError(f"{self._vectors.uri} has {counts}: it was altered by something else; {self._mend}")
        if kept < len(rejects):  # written by a process that was killed before it committed their block's vectors
            self._rejects.delete(f"source_row >= {self._safe_rows}")
        self.vectors, self.rejects = len(vectors), kept
        self._clean()

    def _clean(self) -> None:
        """Removes old versions and the files of killed commits; nobody else may be writing."""
        for dataset in (self._vectors, self._rejects):
            dataset.cleanup_old_versions(retain_versions=1, delete_unverified=True, error_if_tagged_old_versions=False)
            if (directory := local_directory(dataset.uri)) is not None:
                for unfinished in [*directory.rglob(".tmp*"), *directory.rglob("*#*")]:  # manifests, which Lance leaves
                    unfinished.unlink()

    @property
    def _safe_rows(self) -> int:
        return min(self.next_block * self._block_rows, self._rows)

    @property
    def finished(self) -> bool:
        """Whether every input row is a vector or a reject."""
        return self.vectors + self.rejects == self._rows

    def _span(self, indices: Sequence[int]) -> tuple[int, int]:
        """First input row of consecutive blocks, and the one after their last."""
        if list(indices) != list(range(self.next_block, self.next_block + len(indices))) or not indices:
            raise ValueError(f"blocks {list(indices)} were given where block {self.next_block} comes next")
        return self._safe_rows, min((indices[-1] + 1) * self._block_rows, self._rows)

    def append(self, blocks: Sequence[SinkBlock]) -> None:
        """Commits consecutive blocks from `next_block` on, their vectors in one atomic step.

        Args:
            blocks: Together they hold every row of their blocks once, in order of `source_row`.

        Raises:
            InputError: the storage failed, or a second writer is at work.
            ValueError: the blocks are not the next ones, or their rows or columns are not the table's.
        """
        first, stop = self._span([block.index for block in blocks])
        vectors = pa.concat_tables([_conform(block.vectors, self._vectors.schema) for block in blocks])
        rejects = pa.concat_tables([_conform(block.rejects, self._rejects.schema) for block in blocks])
        parts = vectors["source_row"].to_numpy(), rejects["source_row"].to_numpy()
        ordered = all((part[1:] > part[:-1]).all() for part in parts)
        if not ordered or not np.array_equal(np.sort(np.concatenate(parts)), np.arange(first, stop)):
            raise ValueError(f"the blocks do not hold rows {first} to {stop - 1} once each and in order")
        with storage_errors(self._vectors.uri, self._safe_rows):
            fragments = _write(self._vectors, vectors, self._max_bytes_per_file)
        self.append_fragments([block.index for block in blocks], fragments, vectors.num_rows, rejects)

    def append_fragments(self, indices: Sequence[int], fragments: Sequence[str], rows: int, rejects: pa.Table) -> None:
        """Commits consecutive blocks whose vectors were written by `write_fragments`, perhaps on several hosts.

        Args:
            indices: Numbers of the blocks, from `next_block` on.
            fragments: What `write_fragments` returned, in order of `source_row`.
            rows: Vectors in the fragments.
            rejects: Rejected rows of the blocks.

        Raises:
            InputError: the storage failed, or a second writer is at work.
            ValueError: the blocks are not the next ones, or the rows are too few or too many.
        """
        first, stop = self._span(indices)
        held = sum(json.loads(fragment)["physical_rows"] for fragment in fragments)
        if held != rows or rows + rejects.num_rows != stop - first:
            given = f"{held} vectors ({rows} announced) and {rejects.num_rows} rejects"
            raise ValueError(f"{given} were given for rows {first} to {stop - 1}")
        conformed = _conform(rejects, self._rejects.schema)
        with storage_errors(self._vectors.uri, first):
            # rejects first: a kill between the two leaves rejects that opening the table takes back
            self._rejects = _commit(self._rejects, _write(self._rejects, conformed, self._max_bytes_per_file))
            self._vectors = _commit(self._vectors, fragments)
            self._expect(self.vectors + rows, self.rejects + rejects.num_rows)
            self._commits += 1
            if self._commits % _COMMITS_BETWEEN_CLEANINGS == 0:
                for dataset in (self._vectors, self._rejects):  # keeps files that other hosts have just written
                    dataset.cleanup_old_versions(retain_versions=1, error_if_tagged_old_versions=False)
        self.vectors += rows
        self.rejects += rejects.num_rows
        self.next_block = indices[-1] + 1

    def _expect(self, vectors: int, rejects: int) -> None:
        for dataset, expected in ((self._vectors, vectors), (self._rejects, rejects)):
            dataset.checkout_latest()
            if (found := dataset.count_rows()) != expected:
                cause = "a second writer is at work; stop it, then"
                raise InputError(f"{dataset.uri} has {found} rows instead of {expected}: {cause} {self._mend}")

    def finish(self, index: Literal["none", "ivf_sq", "ivf_pq"] = "none") -> Finished:
        """Checks that every input row is there, removes old versions, builds the indexes that are missing.

        Args:
            index: Vector index (cosine); `sequence_id` is always indexed.

        Raises:
            InputError: the storage failed, or a second writer is at work.
            ValueError: rows are missing.
        """
        if not self.finished:
            counts = f"{self.vectors} vectors and {self.rejects} rejects"
            raise ValueError(f"{self._vectors.uri} has {counts} of {self._rows} rows and cannot be finished")
        with storage_errors(self._vectors.uri, self._rows):
            self._expect(self.vectors, self.rejects)
            present = np.zeros(self._rows, bool)
            for dataset in (self._vectors, self._rejects):
                present[self._source_rows(dataset)] = True
            if not present.all():
                missing = int(np.argmin(present))
                raise InputError(f"{self._vectors.uri} lacks row {missing} and has another twice; {self._mend}")
            indexes, notes = build_indexes(self._vectors, index)
            self._clean()
        return Finished(self.vectors, self.rejects, indexes, notes)

    def close(self) -> None:
        """Lets go of the lock."""
        self._held.close()

    def __enter__(self) -> "VectorTable":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
