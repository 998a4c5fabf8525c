"""A worker of a fleet: reads blocks of the input itself, embeds them, and writes files that the driver commits."""

import os
import platform
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.data.in_memory import SequencesInMemory
from bioscan_jax.data.parquet import open_source
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.block import StartedBlock, begin, sequences_before, tally, tokenise, write_part
from bioscan_jax.embedding.dispatch import Dispatcher
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.job import Job, prepare, scratch_directory
from bioscan_jax.embedding.repeats import PreparedBlock, Repeats, VectorCache, fresh_views
from bioscan_jax.embedding.summary import DeviceActivity, peak_device_bytes, versions
from bioscan_jax.errors import InputError
from bioscan_jax.fleet.orders import Earlier, Facts, Greeting, Order, Refusal, Settings, Written
from bioscan_jax.location import locate, read_if_exists, write_whole
from bioscan_jax.table.sink import read_vectors
from bioscan_jax.table.storage import storage_errors, table_path

_PROBES = 16
_PROBE_BASES = 658


class Worker:
    """One group of devices with the encoder loaded; its methods are called by the driver, several at a time.

    `compute` may be called ahead: what it does on the host overlaps the devices' work on other blocks. The vectors
    wait here until `write`, which the driver calls once the blocks that vectors are copied from are written.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held = ExitStack()
        self._activity = DeviceActivity()
        self._starting = threading.Lock()
        self._waiting: dict[int, tuple[Order, StartedBlock]] = {}
        self._job: Job | None = None
        self._dispatcher: Dispatcher | None = None

    def greet(self) -> Greeting:
        """Tells where this worker runs and with which versions."""
        found = versions() | {"ray": metadata.version("ray"), "python": platform.python_version().rpartition(".")[0]}
        return Greeting(host=socket.gethostname(), pid=os.getpid(), versions=found)

    def load(self) -> Facts | Refusal:
        """Loads the model and opens the input; returns what this worker would compute, or why it cannot."""
        begun, settings = time.perf_counter(), self._settings
        try:
            self._check_storage()
            start_devices(settings.mesh)
            scratch = self._held.enter_context(scratch_directory(settings.sink, owned=False))
            source = open_source(settings.data, scratch=scratch)
            encoder = Encoder(loaded=load_weights(settings.model, make_layout(settings.mesh)))
            job = prepare(source, encoder, settings.data, settings.embed, settings.sink)
            self._job = job
            self._dispatcher = self._held.enter_context(Dispatcher(job.blocks.steps, self._activity))
            probe = _probe(job)
        except InputError as error:
            return Refusal(reason=str(error))
        self._activity.resume()
        return Facts(
            plan=job.plan.facts,
            provenance=job.provenance,
            model=job.loaded.facts,
            schema=job.schema,
            encoding=job.blocks.encoding,
            devices=job.devices,
            shapes=[(shape.rows, shape.tokens) for shape in job.blocks.shapes],
            probe=probe,
            load_seconds=time.perf_counter() - begun,
        )

    def park(self) -> None:
        """Gives back what `load` holds, and waits for the end: the worker only keeps its place."""
        self._held.close()
        self._job = self._dispatcher = None
        threading.Event().wait()

    def compute(self, order: Order) -> None:
        """Embeds a block; its vectors wait here.

        Raises:
            InputError: The block cannot be read, is not what the driver has read, or does not fit on the devices.
        """
        job, dispatcher = self._job, self._dispatcher
        assert job is not None
        assert dispatcher is not None
        encoded, _ = tokenise(job.source, job.blocks.encoding, job.source[order.index], named=False)
        repeats = Repeats.none(encoded.counts.distinct) if order.repeats is None else order.repeats
        if len(repeats.copied) != encoded.counts.distinct:
            raise InputError(f"block {order.index} is not the same here and at the driver; the input was changed")
        item = PreparedBlock(encoded, repeats, fresh_views(encoded.views, repeats.copied))
        block = begin(job, item, order.row)
        with job.blocks.memory_errors():
            with self._starting:
                futures = [dispatcher.start(batch, block.results) for batch in block.batches]
            for future in futures:
                future.result()
        self._waiting[order.index] = order, block

    def write(self, index: int, earlier: Mapping[int, Earlier]) -> Written:
        """Writes the files of a block that was computed.

        Args:
            index: The block.
            earlier: The blocks that it needs vectors of.

        Raises:
            InputError: The storage failed, or a file was altered.
        """
        job = self._job
        assert job is not None
        order, block = self._waiting.pop(index)
        self._fill(job, order, block, earlier)
        part = write_part(job, block, len(block.batches))
        steps = job.blocks.steps
        return Written(
            part=part,
            tally=tally(job, block),
            compile_seconds=steps.seconds,
            shapes=[(shape.rows, shape.tokens) for shape in steps.shapes],
            device_busy=self._activity.share,
            peak_device_bytes=peak_device_bytes(),
        )

    def forget(self, index: int) -> None:
        """Drops the vectors of a block that another worker has finished."""
        self._waiting.pop(index, None)

    def _check_storage(self) -> None:
        """Raises InputError unless the directory of the table is the driver's, and can be written."""
        settings, here = self._settings, socket.gethostname()
        uri, own = settings.sink.uri, f"{settings.marker}.{here}.{os.getpid()}"
        where = f"{uri.rstrip('/')}/{settings.marker}"
        with storage_errors(uri):
            if read_if_exists(where) != settings.token:
                raise InputError(
                    f"{uri} is not the directory there that it is for the driver; pass a --sink.uri that all machines "
                    "share: a bucket, or a directory of a network file system"
                )
            write_whole(f"{uri.rstrip('/')}/{own}", settings.token)
            locate(uri, "sink.uri").remove(own)

    def _fill(self, job: Job, order: Order, block: StartedBlock, earlier: Mapping[int, Earlier]) -> None:
        """Fills in the vectors that are copied from earlier blocks, and those that the table has."""
        item, sink = block.item, job.sink
        if order.repeats is not None:
            targets = np.flatnonzero(order.repeats.copied)
            for number in order.needs:
                here = order.repeats.blocks == number
                rows, source = order.rows[here], earlier[number]
                found, there = read_vectors(sink.uri, sink.table, source.fragments, rows)
                if not np.isin(rows[~there], source.not_finite).all():
                    path = table_path(sink.uri, sink.table)
                    raise InputError(f"{path} was altered during this run; run the same command again")
                block.values[targets[here][there]] = found
                block.values[targets[here][~there]] = np.nan
        if stored := sequences_before(item, order.row)[0]:
            none = Repeats.none(len(item.repeats.copied))
            VectorCache(0, sink).fill(block.values, item._replace(repeats=none), stored)


def _probe(job: Job) -> Float32[np.ndarray, "probes d"]:
    """Embeds the same random sequences on every worker, in the batch shapes of the run."""
    random = np.random.default_rng(0)
    encoding = job.blocks.encoding
    # No longer than what fits the shapes of a short input, with the single letters that a start phase leaves over.
    widest = max((shape.tokens for shape in job.blocks.shapes), default=encoding.max_tokens)
    bases = min(_PROBE_BASES, 6 * max(1, widest - 6))
    texts = ["".join(random.choice(list("ACGT"), bases)) for _ in range(_PROBES)]
    source = SequencesInMemory(pa.chunked_array([texts]), _PROBES, encoding.sequence_column)
    encoder = Encoder(loaded=job.loaded)
    return np.concatenate([found for _, found in encoder.encode_blocks(source, encoding, job.embed, blocks=job.blocks)])
