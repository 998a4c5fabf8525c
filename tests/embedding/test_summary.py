"""What a run's summary counts by the clock."""

import pytest

from bioscan_jax.embedding import summary
from bioscan_jax.embedding.summary import InFlight


@pytest.fixture
def flight(monkeypatch):
    """Its clock is a list of times."""
    times = []
    monkeypatch.setattr(summary.time, "perf_counter", lambda: times.pop(0))
    made = InFlight()

    def at(time, what):
        times.append(time)
        getattr(made, what)()

    return made, at


def test_busy_is_while_any_batch_is_out(flight):
    made, at = flight
    for time, what in [(10, "begin"), (11, "given"), (12, "given"), (15, "done"), (16, "done"), (18, "given")]:
        at(time, what)
    at(19, "done")
    at(20, "end")
    assert (made.busy, made.wall) == (6, 10)
    assert made.share == 0.6


def test_time_between_end_and_begin_is_no_time_at_all(flight):
    """A batch that is handed over meanwhile is out when counting goes on."""
    made, at = flight
    for time, what in [(0, "begin"), (1, "end"), (50, "given"), (60, "begin"), (62, "done"), (64, "end"), (99, "done")]:
        at(time, what)
    assert (made.busy, made.wall) == (2, 5)


def test_a_run_without_a_batch_was_never_busy():
    assert InFlight().share == 0
