"""Joins the small files of a finished table into few large ones."""

from dataclasses import dataclass

from bioscan_jax.notebook import Shown
from bioscan_jax.table.index import build_indexes
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.reading import check_finished, open_existing, vector_index
from bioscan_jax.table.storage import open_dataset, storage_errors, table_path

_ROWS_PER_FRAGMENT = 1 << 20


@dataclass(frozen=True)
class CompactSummary(Shown):
    """Fragments of a table and its rejects together, before and after."""

    before: int
    after: int

    def __str__(self) -> str:
        """The counts, as one line."""
        return f"{self.before:,} fragments became {self.after:,}; rows, their order and their indexes are the same"


def compact(uri: str, table: str = "sequences") -> CompactSummary:
    """Joins the fragments of a finished table, one per commit of embed, into fragments of a million rows.

    Rows, their order and indexes stay the same. The data files are written again, so the disk needs free space for a
    second copy. A reader that has the version before open keeps it.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.

    Raises:
        InputError: There is no such table, it is unfinished, another process is writing it, or the storage failed.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path), block_rows=2)
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> done = bj.compact(f"{directory}/vectors")
        >>> (done.before, done.after)
        (3, 1)
    """
    open_existing(uri, table)
    before = after = 0
    with writer_lock(uri, table) as check:
        vectors = open_existing(uri, table)
        check_finished(uri, table, vectors)
        for dataset in (vectors, open_dataset(table_path(uri, f"{table}_rejects"))):
            if dataset is None:
                continue
            with storage_errors(dataset.uri):
                before += len(dataset.get_fragments())
                check()
                dataset.optimize.compact_files(target_rows_per_fragment=_ROWS_PER_FRAGMENT)
                if dataset is vectors:
                    build_indexes(dataset, vector_index(dataset))
                dataset.checkout_latest()
                after += len(dataset.get_fragments())
                dataset.cleanup_old_versions(
                    retain_versions=2, delete_unverified=True, error_if_tagged_old_versions=False
                )
    return CompactSummary(before, after)
