"""A fleet: how much its driver can hand out and commit, and what Ray costs a single worker."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.barcodes import barcodes, describe_input, write_repeated
from benchmarks.figures import Figures, at_least, in_a_process, rounded
from bioscan_jax import config
from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.dashboard import NOT_TRACKED
from bioscan_jax.data.encode import Encoding
from bioscan_jax.data.parquet import open_source
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.embedding.block import Part, Tally, packed
from bioscan_jax.embedding.pipeline import Work
from bioscan_jax.embedding.progress import open_progress
from bioscan_jax.embedding.summary import StageClock
from bioscan_jax.fleet.cluster import Answer, Cluster, Member
from bioscan_jax.fleet.driver import Run
from bioscan_jax.fleet.naming import Naming
from bioscan_jax.fleet.orders import Facts, Order, WorkerRecord, Written
from bioscan_jax.fleet.run import embed as run_embed
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import VectorTable, write_fragments

_WIDTH = 2560
_HERE = "benchmarks.fleet"


class _Simulated(Cluster):
    """Workers that finish a block at once, with the metadata of files that were written before."""

    def __init__(self, workers: int, parts: dict[int, Part]) -> None:
        self._parts, self._answers = parts, []
        self._idle = [Member(WorkerRecord(name=f"worker {n}"), None, state="ready") for n in range(workers)]
        self.facts, self.records, self.refused, self.lost, self.load_seconds = None, [], [], 0, 0.0

    @property
    def ready(self) -> list[Member]:
        return self._idle

    def grow(self, most: int) -> None:
        """Does nothing: all workers are there."""

    def compute(self, member: Member, order: Order) -> None:
        self._answers.append(Answer(member, "compute", order.index, None, None))

    def write(self, member: Member, block: int, earlier: dict) -> None:
        rows = self._parts[0].rows
        part = dataclasses.replace(self._parts[block % len(self._parts)], stop=(block + 1) * rows)
        written = Written(
            part=part, tally=Tally(), compile_seconds=0.0, shapes=[], device_busy=1.0, peak_device_bytes=None
        )
        self._answers.append(Answer(member, "write", block, written, None))

    def poll(self, seconds: float, on_lost: Any) -> list[Answer]:
        return [self._answers.pop(0)]  # so that each block is a commit of its own, the most work for the driver


def fleet(
    part: Literal["driver", "overhead"],
    data: config.DataConfig | None = None,
    model: str = "random:tiny-v2",
    rows: int = 20_000,
    workers: int = 100,
    repeats: int = 3,
    embed: config.EmbedConfig | None = None,
) -> Figures:
    """Measure the driver of a fleet, or what Ray costs.

    driver: rows that the driver alone hands out and commits in a second, with simulated workers and the metadata of
    real files of 8,192 vectors of 2,560 numbers, and rows that it reads ahead to find repeats. overhead: seconds of one
    worker through Ray and of one process without Ray, in turns; the seconds of a run of one block are subtracted.

    Args:
        part: What to measure.
        data: Barcodes to use; 658 bp are simulated if absent.
        model: Checkpoint, for overhead.
        rows: Rows of a run, for overhead; rows that are read ahead, for driver.
        workers: Simulated workers, for driver.
        repeats: Runs of each kind.
        embed: Settings of the vectors, for overhead.

    Raises:
        InputError: A number is too small.
    """
    at_least(rows=(rows, 2), workers=(workers, 1), repeats=(repeats, 1))
    found: Figures = {"part": part, "input": describe_input(data, 0)}
    with tempfile.TemporaryDirectory() as directory:
        if part == "driver":
            return found | _driver(Path(directory), data, rows, workers, repeats)
        return found | _overhead(Path(directory), data, model, rows, repeats, embed or config.EmbedConfig())


def _driver(directory: Path, data: config.DataConfig | None, rows: int, workers: int, repeats: int) -> Figures:
    rates, naming = [], []
    for number in range(repeats):
        rates.append(_commit_rate(directory, number, 500, workers))
        write_repeated(barcodes(data, rows, number), rows, directory / "named.parquet")
        source = open_source(config.DataConfig(path=str(directory / "named.parquet")), scratch=None)
        encoding = Encoding(
            sequence_column=source.sequence_column,
            vocabulary=Vocabulary.published("v2"),
            max_tokens=2048,
            overlong="truncate",
            strand="forward",
            phases=1,
            deduplicate=True,
        )
        begun = time.perf_counter()
        with Naming(source, encoding, 8, 0, len(source)) as named:
            while named.order(len(source) - 1) is None:
                time.sleep(0.001)
        naming.append(source.rows / (time.perf_counter() - begun))
    return {
        "workers": workers,
        "blocks": 500,
        "rows_per_block": config.DataConfig.block_rows,
        "commit_rows_per_second": rounded(float(np.median(rates))),
        "naming_rows_per_second": rounded(float(np.median(naming))),
        "naming_rows": rows,
    }


def _commit_rate(directory: Path, number: int, blocks: int, workers: int) -> float:
    block_rows, uri = config.DataConfig.block_rows, str(directory / f"table-{number}")
    path = directory / "rows.parquet"
    few = pa.table({"dna_sequence": pa.array(["ACGT"]).take(pa.array(np.zeros(blocks * block_rows, np.int64)))})
    pq.write_table(few, path)
    source = open_source(config.DataConfig(path=str(path)), scratch=None)
    schema, sink = vector_schema(source.schema, _WIDTH, "float32"), config.SinkConfig(uri=uri)
    plan = Plan({"benchmark": number})
    with VectorTable.open(
        uri,
        sink.table,
        schema=schema,
        plan=plan,
        provenance={},
        rows=source.rows,
        block_rows=block_rows,
        max_bytes_per_file=sink.max_bytes_per_file,
    ) as table:
        parts = {0: _written_block(uri, sink, schema, block_rows)}
        facts = Facts(
            plan={},
            provenance={},
            model={},
            schema=schema,
            encoding=None,  # pyright: ignore[reportArgumentType] - nothing is read where repeats are not looked for
            devices="simulated",
            shapes=[],
            probe=np.zeros((1, _WIDTH), np.float32),
            load_seconds=0.0,
        )
        settings, fleet = config.EmbedConfig(cache_rows=0), config.FleetConfig(address="simulated")
        cluster, work = _Simulated(workers, parts), Work(0)
        shown = open_progress(
            NOT_TRACKED, "disabled", sink, rows=source.rows, resumed=0, plan=plan, settings={}, shown=False
        )
        with shown as progress:
            run = Run(cluster, source, settings, sink, fleet, facts, table, work, progress, StageClock())
            begun = time.perf_counter()
            run.until_finished(StopRequest())
            return source.rows / (time.perf_counter() - begun)


def _written_block(uri: str, sink: config.SinkConfig, schema: pa.Schema, rows: int) -> Part:
    """Writes a block of vectors that no commit refers to yet."""
    values = np.random.default_rng(0).standard_normal(rows * _WIDTH, np.float32)
    columns = {
        "sequence_id": pa.array(range(rows)).cast(pa.string()),
        "source_row": pa.array(range(rows), pa.uint64()),
        "dna_sequence": pa.array(["ACGT"] * rows),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(values), _WIDTH),
    }
    data = pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
    fragments = write_fragments(uri, sink.table, data, max_bytes_per_file=sink.max_bytes_per_file)
    return Part(
        stop=rows,
        whole=True,
        rows=rows,
        fragments=fragments,
        rejects=packed(REJECTS.empty_table()),
        not_finite=0,
        example=None,
    )


def _overhead(
    directory: Path, data: config.DataConfig | None, model: str, rows: int, repeats: int, embed: config.EmbedConfig
) -> Figures:
    given, block = barcodes(data, rows, 0), min(1024, rows // 2)
    sizes = {"whole": rows, "start": block}
    for name, size in sizes.items():
        write_repeated(given, size, directory / f"{name}.parquet")
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(repeats):
        for name in sizes:
            for how in ("alone", "ray") if number % 2 else ("ray", "alone"):
                uri = str(directory / f"{name}-{how}-{number}")
                taken = in_a_process(
                    f"{_HERE}:timed",
                    path=str(directory / f"{name}.parquet"),
                    uri=uri,
                    how=how,
                    model=model,
                    block=block,
                    embed=dataclasses.asdict(embed),
                )
                seconds.setdefault((name, how), []).append(taken)
    start = {how: float(np.median(seconds["start", how])) for how in ("alone", "ray")}
    steady = {how: float(np.median(seconds["whole", how])) - start[how] for how in start}
    return {
        "model": model,
        "rows": rows,
        "block_rows": block,
        "start_seconds_alone": rounded(start["alone"]),
        "start_seconds_ray": rounded(start["ray"]),
        "seconds_alone": rounded(steady["alone"]),
        "seconds_ray": rounded(steady["ray"]),
        "overhead": rounded(steady["ray"] / steady["alone"] - 1.0),
    }


def timed(path: str, uri: str, how: str, model: str, block: int, embed: dict[str, Any]) -> float:
    """Embeds a file, by Ray or alone; returns the seconds."""
    begun = time.perf_counter()
    run_embed(
        config.ModelConfig(checkpoint=model),
        config.DataConfig(path=path, block_rows=block),
        config.SinkConfig(uri=uri),
        config.EmbedConfig(**embed),
        fleet=config.FleetConfig(address="local", workers=1, start_seconds=300.0) if how == "ray" else None,
        progress=False,
    )
    return time.perf_counter() - begun
