"""The clocks behind a run's summary."""

import pytest

from bioscan_jax.embedding import summary
from bioscan_jax.embedding.summary import DeviceActivity


@pytest.fixture
def activity(monkeypatch):
    """Its clock is a list of times."""
    times = []
    monkeypatch.setattr(summary.time, "perf_counter", lambda: times.pop(0))
    made = DeviceActivity()

    def at(time, what):
        times.append(time)
        getattr(made, what)()

    return made, at


def test_busy_is_while_any_batch_is_out(activity):
    made, at = activity
    for time, what in [
        (10, "resume"),
        (11, "batch_started"),
        (12, "batch_started"),
        (15, "batch_finished"),
        (16, "batch_finished"),
        (18, "batch_started"),
    ]:
        at(time, what)
    at(19, "batch_finished")
    at(20, "pause")
    assert (made.busy, made.wall) == (6, 10)
    assert made.share == 0.6


def test_paused_time_does_not_count(activity):
    """A batch that is started meanwhile counts from `resume` on."""
    made, at = activity
    for time, what in [
        (0, "resume"),
        (1, "pause"),
        (50, "batch_started"),
        (60, "resume"),
        (62, "batch_finished"),
        (64, "pause"),
        (99, "batch_finished"),
    ]:
        at(time, what)
    assert (made.busy, made.wall) == (2, 5)


def test_a_run_without_a_batch_was_never_busy():
    assert DeviceActivity().share == 0
