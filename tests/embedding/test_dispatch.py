"""How much is on the devices at a time."""

import threading
import time

import numpy as np
import pytest

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.embedding import dispatch
from bioscan_jax.embedding.dispatch import Dispatcher
from bioscan_jax.embedding.step import CompiledSteps


class SlowSteps(CompiledSteps):
    """Computes one batch after another in a thread, as a device does; records how many wait."""

    def __init__(self):
        self.seconds = 0.0
        self.shapes, self.waiting, self.most, self.lock = {}, 0, 0, threading.Lock()

    def __call__(self, ids):
        with self.lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        return Result(self, ids)


class Result:
    def __init__(self, steps, ids):
        self.steps, self.ids = steps, ids

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        time.sleep(0.003)
        with self.steps.lock:
            self.steps.waiting -= 1
        return self.ids.astype(np.float32)


def batches(count):
    ids = np.arange(count * 4 * 8, dtype=np.int32).reshape(count, 4, 8)
    rows = np.random.default_rng(0).permutation(count * 3).reshape(count, 3)
    return [TokenBatch(one, place) for one, place in zip(ids, rows, strict=True)]


@pytest.mark.parametrize(("size", "seconds", "most"), [(0, 9.0, 2), (1 << 20, 0.0, 2), (5 * 4 * 16 * 4, 9.0, 5)])
def test_work_ahead_is_bounded_by_bytes_and_by_seconds(monkeypatch, size, seconds, most):
    """A batch of 4 x 8 tokens and vectors of 8 numbers takes 4 x 16 x 4 bytes."""
    monkeypatch.setattr(dispatch, "BYTES_AHEAD", size)
    monkeypatch.setattr(dispatch, "SECONDS_AHEAD", seconds)
    steps, vectors = SlowSteps(), np.zeros((90, 8), np.float32)
    with Dispatcher(steps) as dispatcher:
        assert dispatcher.seconds(1) == float("inf")
        futures = [dispatcher.start(batch, vectors) for batch in batches(30)]
        for future in futures:
            future.result()
        assert 0 < dispatcher.seconds(32) < float("inf")
    assert steps.most == most
    for batch in batches(30):
        np.testing.assert_array_equal(vectors[batch.rows], batch.ids[:3])


def test_a_batch_that_fails_frees_its_room():
    class Failing(SlowSteps):
        def __call__(self, ids):
            raise MemoryError("the device is full")

    vectors = np.zeros((90, 8), np.float32)
    with Dispatcher(Failing()) as dispatcher:
        for batch in batches(3):
            with pytest.raises(MemoryError, match="full"):
                dispatcher.start(batch, vectors)
