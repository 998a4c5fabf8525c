"""Applies a projection to a table of raw vectors, without the model that made them."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.checkpoints.load import projection_facts
from bioscan_jax.checkpoints.projection_files import read_projection
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.step import Projector
from bioscan_jax.embedding.summary import versions
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_copy
from bioscan_jax.model.projection import Projection, ProjectionInputs
from bioscan_jax.notebook import Shown, progress_bar
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.reading import check_finished, open_existing, schema_metadata
from bioscan_jax.table.sink import SinkBlock, VectorTable
from bioscan_jax.table.storage import drop_if_empty, open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance


@dataclass(frozen=True, kw_only=True)
class ProjectSummary(Shown):
    """Result of `project`.

    Example:
        >>> summary = ProjectSummary(
        ...     table="db/sequences.lance", rows=9, vectors=8, resumed_at=0, features=64, dimension=24, seconds=2.0, index=""
        ... )
        >>> print(summary)
        db/sequences.lance: 8 vectors of 64 numbers projected to 24 in 2.0 s
    """

    table: str
    """Path of the table."""
    rows: int
    """Rows of the original input."""
    vectors: int
    """Vectors in the table."""
    resumed_at: int
    """First row of the input that this run projected."""
    features: int
    """Numbers per raw vector."""
    dimension: int
    """Numbers per projected vector."""
    seconds: float
    index: str
    """The indexes that were built."""

    def __str__(self) -> str:
        resumed = f" (continued at row {self.resumed_at:,} of {self.rows:,})" if self.resumed_at else ""
        made = f"{self.vectors:,} vectors of {self.features} numbers projected to {self.dimension}"
        return f"{self.table}: {made} in {self.seconds:.1f} s{resumed}"


def project(
    reference: config.ReferenceConfig,
    projection: str,
    sink: config.SinkConfig,
    mesh: config.MeshConfig | None = None,
    *,
    progress: bool = True,
) -> ProjectSummary:
    """Writes a table's vectors, projected, into a new table with the same other columns; continues where it stopped.

    The new table is what `embed` would have made with the projection, up to rounding: identify, calibrate and search
    load the table's model with this projection.

    Example:
        >>> import bioscan_jax as bj
        >>> import numpy as np
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> from bioscan_jax.checkpoints.projection_files import write_projection
        >>> from bioscan_jax.matching.reference import open_reference
        >>> from bioscan_jax.model.projection import Projection, ProjectionInputs
        >>> _ = write_simulated("barcodes.parquet", species=4, per_species=5, length=120, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.parquet")
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri="raw"), progress=False)
        >>> inputs = ProjectionInputs.from_plan(open_reference(bj.ReferenceConfig(uri="raw")).plan)
        >>> first = Projection(mean=np.zeros(64, np.float32), linear=np.eye(64, 8, dtype=np.float32), inputs=inputs)
        >>> _ = write_projection("projection", first)
        >>> project(bj.ReferenceConfig(uri="raw"), "projection", bj.SinkConfig(uri="out"), progress=False).dimension
        8

    Args:
        reference: The table of raw vectors.
        projection: Directory of a projection that was fitted on vectors of the same model and settings.
        sink: Which table to write.
        mesh: Devices.
        progress: Show a bar on the terminal.

    Raises:
        InputError: The table is unfinished, already projected, of another model, pooling, layer or width, or has a
            vector that is not finite; the projection cannot be read; or the storage failed.
    """
    mesh, begun = mesh or config.MeshConfig(), time.perf_counter()
    dataset = open_existing(reference.uri, reference.table)
    found = read_projection(local_copy(projection, "projection"))
    facts = _check_source(reference, dataset, found)
    if table_path(sink.uri, sink.table) == table_path(reference.uri, reference.table):
        raise InputError(f"--sink.uri {sink.uri}: that is the table of raw vectors itself; pass another one")
    start_devices(mesh)
    projector = Projector(found, make_layout(mesh))
    rows, block_rows = int(facts["rows"]), int(facts["block_rows"])
    item = {"float32": pa.float32(), "float16": pa.float16()}[sink.vector_dtype]
    schema = pa.schema([_projected_field(field, pa.list_(item, found.dimension)) for field in dataset.schema])
    kept = facts.keys() - {"plan", "plan_facts", "rows", "block_rows"}
    made_by = {name: facts[name] for name in sorted(kept)} | projection_facts(found, projection)
    with ExitStack() as held:
        lock = held.enter_context(writer_lock(sink.uri, sink.table))
        table = held.enter_context(
            VectorTable.open(
                sink.uri,
                sink.table,
                schema=schema,
                plan=_plan(facts, found, sink),
                provenance=made_by | {"library_version": versions()["bioscan_jax"]},
                rows=rows,
                block_rows=block_rows,
                max_bytes_per_file=sink.max_bytes_per_file,
                lock=lock,
            )
        )
        resumed = min(table.next_block * block_rows, rows)
        bar = held.enter_context(
            progress_bar(total=rows, initial=resumed, unit="row", desc="project", disable=not progress)
        )
        try:
            for index, block, rejects in _blocks(reference, dataset, table.next_block, rows, block_rows):
                values = projector(_raw_vectors(dataset, block)).astype(np.dtype(sink.vector_dtype))
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), found.dimension)
                place = block.schema.get_field_index("vector")
                table.append([SinkBlock(index, block.set_column(place, "vector", vectors), rejects)])
                bar.update(min((index + 1) * block_rows, rows) - bar.n)
        except InputError:
            with suppress(InputError):
                drop_if_empty(sink.uri, sink.table)
            raise
        finished = table.finish(sink.index)
    return ProjectSummary(
        table=table_path(sink.uri, sink.table),
        rows=rows,
        vectors=finished.vectors,
        resumed_at=resumed,
        features=found.features,
        dimension=found.dimension,
        seconds=time.perf_counter() - begun,
        index="; ".join([*finished.indexes, *finished.notes]),
    )


def _check_source(
    reference: config.ReferenceConfig, dataset: "lance.LanceDataset", projection: Projection
) -> dict[str, str]:
    """Returns the metadata of a table whose vectors the projection fits.

    Raises:
        InputError: It does not fit them.
    """
    facts, where = schema_metadata(dataset), dataset.uri
    vectors = dataset.schema.field("vector").type if "vector" in dataset.schema.names else pa.null()
    if not {"plan", "plan_facts", "rows", "block_rows"} <= facts.keys() or not pa.types.is_fixed_size_list(vectors):
        raise InputError(f"{where} is not a table of vectors that embed made; pass one")
    if "bundle" in facts:
        raise InputError(f"{where} came from a bundle with rounded vectors or without some rows; project its original")
    plan = json.loads(facts["plan_facts"])
    if "projection_sha256" in plan["model"]:
        raise InputError(
            f"{where} is already projected ({facts.get('projection', 'unknown')}); pass a table of raw vectors, made "
            "with --model.projection none"
        )
    projection.inputs.check(
        ProjectionInputs.from_plan(plan), where, "pass a projection that fit-metric made from such a table"
    )
    if projection.features != vectors.list_size:
        raise InputError(
            f"{where}: its vectors have {vectors.list_size} numbers, the projection takes {projection.features}; pass "
            "a projection that fit-metric made from this table"
        )
    check_finished(reference.uri, reference.table, dataset)
    return facts


def _plan(facts: dict[str, str], projection: Projection, sink: config.SinkConfig) -> Plan:
    """Returns the plan of the projected table: that of the raw one with the projection."""
    plan = json.loads(facts["plan_facts"])
    return Plan(
        plan
        | {
            "model": plan["model"] | {"projection_sha256": projection.sha256},
            "vector_dtype": sink.vector_dtype,
            "projected_from": facts["plan"],
        }
    )


def _projected_field(field: pa.Field, vectors: pa.DataType) -> pa.Field:
    """Returns a column of the new table; it does not matter there which columns were joined later."""
    return pa.field("vector", vectors, nullable=False) if field.name == "vector" else field.remove_metadata()


def _blocks(
    reference: config.ReferenceConfig, dataset: "lance.LanceDataset", first: int, rows: int, block_rows: int
) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yields the number, the vectors and the rejects of each block from `first` on."""
    numbers = np.arange(first, -(-rows // block_rows) + 1)
    with storage_errors(dataset.uri):
        source_rows = dataset.to_table(columns=["source_row"])["source_row"].to_numpy()
        if (source_rows[1:] <= source_rows[:-1]).any():
            raise InputError(f"{dataset.uri}: its rows are not in the order of the input; embed them again")
        found = open_dataset(table_path(reference.uri, f"{reference.table}_rejects"))
        rejects = REJECTS.empty_table() if found is None else found.to_table(columns=REJECTS.names)
        bounds = np.searchsorted(source_rows, (numbers * block_rows).astype(np.uint64))
        reject_bounds = np.searchsorted(rejects["source_row"].to_numpy(), (numbers * block_rows).astype(np.uint64))
    for i, number in enumerate(numbers[:-1].tolist()):
        start, count = int(bounds[i]), int(bounds[i + 1] - bounds[i])
        with storage_errors(dataset.uri):
            block = dataset.to_table(offset=start, limit=count) if count else dataset.schema.empty_table()
        yield number, block, rejects.slice(int(reject_bounds[i]), int(reject_bounds[i + 1] - reject_bounds[i]))


def _raw_vectors(dataset: "lance.LanceDataset", block: pa.Table) -> np.ndarray:
    """Returns the vectors of a block as float32.

    Raises:
        InputError: One is not finite.
    """
    flat = block["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    vectors = flat.reshape(block.num_rows, block.schema.field("vector").type.list_size)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        name = block["sequence_id"][int(bad[0])].as_py()
        raise InputError(f"{dataset.uri}: the vector of {name!r} is not finite; embed the table again")
    return vectors
