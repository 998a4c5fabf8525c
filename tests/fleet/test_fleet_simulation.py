import dataclasses

import pytest
from support.commands import call

from bioscan_jax.errors import InputError
from bioscan_jax.fleet.simulate import Fleet, Policy, simulate

CALM = Fleet(
    rows=12_000,
    workers=4,
    preempted_hours=0.0,
    spread=0.0,
    slow_share=0.0,
    startup_seconds=100.0,
    commit_seconds=0.0,
    fragment_microseconds=0.0,
)


def test_a_calm_fleet_takes_its_arithmetic():
    found = simulate(CALM, Policy())
    assert (found.blocks, found.block_rows) == (20, 600)
    assert found.ideal_hours * 3600 == pytest.approx(300)
    assert found.hours * 3600 == pytest.approx(400)
    assert found.worker_hours["kept"] * 3600 == pytest.approx(4 * 300)
    assert found.worker_hours["starting"] * 3600 == pytest.approx(4 * 100)
    assert found.share("kept") + found.share("starting") == pytest.approx(1)
    assert (found.preempted, found.repeated, found.thrown_away) == (0, 0, 0)


def test_slow_commits_are_waited_for():
    """Of the last four blocks, which end together, the first is committed alone and the others after it."""
    slow = dataclasses.replace(CALM, commit_seconds=7.0)
    assert simulate(slow, Policy()).hours * 3600 == pytest.approx(400 + 2 * 7)


def test_preemptions_cost_what_was_in_work_and_repeat_with_the_seed():
    fleet = Fleet(rows=200_000, workers=20, preempted_hours=0.1, away_minutes=2.0, startup_seconds=30.0)
    found = simulate(fleet, Policy())
    assert found == simulate(fleet, Policy())
    assert found != simulate(dataclasses.replace(fleet, seed=1), Policy())
    assert found.repeated > found.preempted > 20
    assert found.worker_hours["lost"] > 0
    assert found.most_ahead <= 16 * 20
    assert sum(found.worker_hours.values()) < found.hours * 20
    assert found.hours > found.ideal_hours
    assert simulate(fleet, Policy(blocks_ahead=1.0)).share("idle") > found.share("idle")


def test_the_command_says_that_it_is_simulated():
    done = call("fleet", "simulate", "--rows", 9000, "--workers", 3, "--block_seconds", "60,90", "--copies", 1)
    lines = done.stdout.splitlines()
    assert lines[0].strip().startswith("SIMULATED")
    assert len(lines) == 6 + 2 * 3
    assert "pass at least 1" in call("fleet", "simulate", "--workers", 0).stderr
    assert "too many to simulate" in call("fleet", "simulate", "--block_seconds", "0.1").stderr
    assert "pass one of plan, simulate first" in call("fleet").stderr
    assert "a value each" in call("fleet", "simulate", "--block_seconds", "[]").stderr
    assert "--copies -1" in call("fleet", "simulate", "--copies", "[-1]").stderr
    assert "at most 100,000" in call("fleet", "simulate", "--workers", 10**9).stderr


def test_a_run_that_cannot_end_is_refused(monkeypatch):
    monkeypatch.setattr("bioscan_jax.fleet.simulate._MOST_MACHINES", 1000)
    with pytest.raises(InputError, match=r"1,\d+ machines were taken away .* lower --block_seconds"):
        simulate(Fleet(rows=100, workers=10), Policy(block_seconds=1e9))
