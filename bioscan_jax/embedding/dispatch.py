"""Starts batches on the devices ahead of need, a bounded amount, and brings their vectors to the host."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float32

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.memory import is_out_of_memory
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.embedding.step import CompiledSteps, CountingSteps
from bioscan_jax.embedding.summary import DeviceActivity

BATCHES_AHEAD = 2
"""Batches that may always be on the devices, so that one is ready when another ends."""
BYTES_AHEAD = 64 << 20
"""Bytes of token ids and vectors that may be on all devices of a process, beyond `BATCHES_AHEAD`."""
SECONDS_AHEAD = 4.0
"""Seconds of work that may be on the devices, beyond `BATCHES_AHEAD`; a preempted machine has about 30 to end."""


class BatchTooLarge(MemoryError):
    """The devices had too little memory for a batch of this shape."""

    def __init__(self, shape: BatchShape, cause: str):
        super().__init__(cause)
        self.shape = shape


@contextmanager
def _too_large(ids: np.ndarray) -> Iterator[None]:
    """Raises an out-of-memory error in its block as `BatchTooLarge`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise BatchTooLarge(BatchShape(*ids.shape), str(error)) from error


class Dispatcher:
    """Starts batches on the devices; a thread of its own copies each result to the host and frees it on the devices.

    `start` waits while the devices have enough to do: by count, by bytes and by seconds, at the rate measured so far.
    A context manager: its end waits for the copy in progress.
    """

    def __init__(
        self,
        steps: CompiledSteps | CountingSteps,
        activity: DeviceActivity | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        self._steps, self._activity = steps, activity or DeviceActivity()
        self._profiler = profiler or StepProfiler(None, "embed")
        self._fetcher = ThreadPoolExecutor(1, "fetcher")
        self._changed = threading.Condition()
        self._batches = self._bytes = self._tokens = 0
        self._rate: float | None = None
        self._idle_since = 0.0

    def __enter__(self) -> "Dispatcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self._fetcher.shutdown(wait=True, cancel_futures=True)

    def start(self, batch: TokenBatch, vectors: Float32[np.ndarray, "rows d"]) -> "Future[None]":
        """Starts a batch; its vectors are in `vectors`, at `batch.rows`, once the future is done.

        Raises:
            BatchTooLarge: The devices have too little memory; the future may raise it too.
        """
        tokens, size = batch.ids.size, batch_bytes(BatchShape(*batch.ids.shape), vectors.shape[1])
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(tokens, size))
            self._add(1, tokens, size)
        try:
            with _too_large(batch.ids):
                result, begun = self._launch(batch)
        except BaseException:
            with self._changed:
                self._add(-1, -tokens, -size)
            raise
        return self._fetcher.submit(self._fetch, batch, result, vectors, begun, tokens, size)

    def seconds(self, tokens: int) -> float:
        """Estimates how long so many tokens, padding included, take; infinite before the first batch has ended."""
        return float("inf") if self._rate is None else tokens / self._rate

    def _has_room(self, tokens: int, size: int) -> bool:
        if self._batches < BATCHES_AHEAD:
            return True
        return self._bytes + size <= BYTES_AHEAD and self.seconds(self._tokens + tokens) <= SECONDS_AHEAD

    def _add(self, batches: int, tokens: int, size: int) -> None:
        self._batches, self._tokens, self._bytes = self._batches + batches, self._tokens + tokens, self._bytes + size
        self._changed.notify_all()

    def _launch(self, batch: TokenBatch) -> tuple[Any, float]:
        """Starts a batch and the copy of its result; the first of its shape, which compiles, does not count as busy."""
        steps, activity = self._steps, self._activity
        begun, compiled = time.perf_counter(), steps.seconds
        known = BatchShape(*batch.ids.shape) in steps.shapes
        if known:
            activity.batch_started()
        else:
            activity.pause()
        result = self._profiler.run(batch.ids.shape, steps, batch.ids)
        if not known:
            activity.batch_started()
            activity.resume()
        result.copy_to_host_async()
        return result, begun + steps.seconds - compiled

    def _fetch(
        self,
        batch: TokenBatch,
        result: Any,
        vectors: Float32[np.ndarray, "rows d"],
        begun: float,
        tokens: int,
        size: int,
    ) -> None:
        try:
            with _too_large(batch.ids):
                vectors[batch.rows] = np.asarray(result)[: len(batch.rows)]
        finally:
            self._activity.batch_finished()
            now = time.perf_counter()
            with self._changed:
                rate = tokens / max(now - max(begun, self._idle_since), 1e-6)
                self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate
                self._idle_since = now
                self._add(-1, -tokens, -size)


def batch_bytes(shape: BatchShape, width: int) -> int:
    """Returns the bytes of a batch on all devices together: int32 token ids, and float32 vectors of `width` numbers."""
    return 4 * shape.rows * (shape.tokens + width)


def bytes_ahead(shape: BatchShape, width: int) -> int:
    """Returns the most bytes that batches of one shape occupy on all devices together, beside the one computed."""
    return max(BYTES_AHEAD, (BATCHES_AHEAD - 1) * batch_bytes(shape, width))
