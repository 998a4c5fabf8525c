"""Commits to a table exactly once: never on top of another writer's, never twice because an answer was lost."""

import errno
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.location import local_directory
from bioscan_jax.table.lock import Check
from bioscan_jax.table.storage import open_dataset

if TYPE_CHECKING:
    import lance

_ATTEMPTS = 3
_PREFIX = "bioscan_jax."
"""Of the keys of transaction properties."""


def write_files(dataset: "lance.LanceDataset", data: pa.Table, max_bytes_per_file: int) -> list[str]:
    """Writes data files that no version of the table refers to yet.

    Args:
        dataset: The table.
        data: Rows, in the table's columns and types.
        max_bytes_per_file: A new file is started past this size.

    Returns:
        Each fragment as JSON, for `append_files`.
    """
    from lance.fragment import write_fragments

    if not data.num_rows:
        return []
    # Lance checks the size of a file only between batches, and a block is one batch
    batch_rows = max(1, data.num_rows * max_bytes_per_file // (16 * data.nbytes))
    batches = data.to_reader(max_chunksize=batch_rows)
    fragments = write_fragments(batches, dataset, max_bytes_per_file=max_bytes_per_file)
    for file in [file for fragment in fragments for file in fragment.files]:
        _check_whole(f"{dataset.uri}/data/{file.path}", file.file_size_bytes)
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def _check_whole(path: str, size: int | None) -> None:
    """Raises OSError if a local file is short: Lance does not report a disk that fills up while it writes the end."""
    local = local_directory(path)
    if local is not None and (found := local.stat().st_size) != size:
        raise OSError(
            errno.ENOSPC, f"only {found} of {size} bytes could be written to {path}; ulimit -f also bounds it"
        )


def append_files(
    dataset: "lance.LanceDataset", fragments: Sequence[str], what: Mapping[str, str], check: Check
) -> "lance.LanceDataset":
    """Commits files that `write_files` wrote as new rows; see `commit`."""
    import lance

    if not fragments:
        return dataset
    append = lance.LanceOperation.Append([lance.FragmentMetadata.from_json(fragment) for fragment in fragments])
    return commit(dataset, append, what, check)


def commit(
    dataset: "lance.LanceDataset",
    operation: "lance.LanceOperation.BaseOperation",
    what: Mapping[str, str],
    check: Check,
) -> "lance.LanceDataset":
    """Commits an operation on top of the version that was read.

    The error of an object store may hide a success, so that after one the table is searched for this transaction: Lance
    puts an append on top of any other commit, even of the same transaction.

    Args:
        dataset: The version that the operation was made for.
        operation: The change.
        what: Properties of the transaction, which tell others who committed what.
        check: Raises InputError if the table's lock was lost.

    Returns:
        The new version.

    Raises:
        InputError: The lock was lost, or somebody else has committed since.
        OSError: The storage failed, and this transaction is not in the table.
    """
    import lance

    check()
    if dataset.latest_version > dataset.version:
        raise _second_writer(dataset)
    properties = {_PREFIX + key: value for key, value in what.items()}
    transaction = lance.Transaction(dataset.version, operation, transaction_properties=properties)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return lance.LanceDataset.commit(dataset, transaction, max_retries=0)
        except (OSError, RuntimeError, ValueError) as error:
            if (found := _committed(dataset, transaction)) is not None:
                return found
            if attempt == _ATTEMPTS or local_directory(dataset.uri) is not None:
                raise
            logger.warning(f"{dataset.uri}: a commit failed ({one_line(error)}); trying again")
            time.sleep(2**attempt)
    raise AssertionError


def _committed(dataset: "lance.LanceDataset", transaction: "lance.Transaction") -> "lance.LanceDataset | None":
    """Returns the table with the transaction if it is in a later version than `dataset`."""
    latest = open_dataset(dataset.uri)
    assert latest is not None
    for version in range(dataset.version + 1, latest.version + 1):
        found = latest.read_transaction(version)
        if found is not None and found.uuid == transaction.uuid:
            return latest
    return None


def _second_writer(dataset: "lance.LanceDataset") -> InputError:
    """Returns the error for a version that another process committed."""
    latest = dataset.latest_version
    found = dataset.read_transaction(latest)
    properties = (found.transaction_properties or {}) if found is not None else {}
    ours = [
        f"{key.removeprefix(_PREFIX)} {value}" for key, value in sorted(properties.items()) if key.startswith(_PREFIX)
    ]
    return InputError(
        f"{dataset.uri}: a second writer committed version {latest} ({', '.join(ours) or 'not this library'}) after "
        f"this process had read version {dataset.version}; stop it, then run the same command again"
    )
