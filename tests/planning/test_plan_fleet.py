import re

import pytest
from support.commands import call

from bioscan_jax import EmbedConfig, ModelConfig
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning.fleet import plan_fleet

TINY = ModelConfig(checkpoint="random:tiny-v2")
MODEL = PRESETS["tiny-v2"]


def test_the_bound_is_the_longer_of_products_and_weights():
    found = plan_fleet(10_000, TINY, "v5e-8", 2, tokens=100, embed=EmbedConfig(phases=3, batch_tokens=100_000))
    assert not found.measured
    assert found.rows_per_second == pytest.approx(8 * 197e12 / (3 * MODEL.forward_flops(100, 100)))
    few = plan_fleet(10_000, TINY, "2 x NVIDIA L4", 2, tokens=100, embed=EmbedConfig(batch_tokens=100))
    weights = 2 * MODEL.num_hidden_layers * MODEL.layer_matmul_parameters
    assert few.rows_per_second == pytest.approx(2 * 300e9 / weights)
    assert "a bound, not a measurement" in str(few)
    assert "at least" in str(few)


def test_a_measured_speed_wins_and_the_price_is_of_paid_hours(tmp_path):
    (tmp_path / "p.csv").write_text("device,price_per_hour\nv3-8,2.5\n")
    (tmp_path / "p.json").write_text('{"v3-8": 2.5}')
    plans = [
        plan_fleet(720_000, TINY, "v3-8", 2, rows_per_second=50.0, preempted_hours=0.0, prices=str(tmp_path / name))
        for name in ("p.csv", "p.json")
    ]
    assert plans[0] == plans[1]
    found = plans[0]
    assert 2 < found.hours < 2.2  # 7,200 s, the start, and uneven last blocks
    assert found.machine_hours == pytest.approx(2 * found.hours)
    assert found.price == pytest.approx(2.5 * found.machine_hours)
    assert found.outcome.block_rows == 3000  # a minute
    text = str(found)
    assert "measured by you" in text
    assert "SIMULATED" in text
    assert "at least" not in text
    assert "finishes a block every 30 s" in text
    apart = EmbedConfig(cache_rows=0)
    assert "repeats" not in str(plan_fleet(720_000, TINY, "v3-8", 2, rows_per_second=50.0, embed=apart))
    taken = plan_fleet(720_000, TINY, "v3-8", 2, rows_per_second=50.0, preempted_hours=0.5)
    assert taken.hours > found.hours
    assert taken.machine_hours < 2 * taken.hours
    assert taken.price is None


def test_a_long_run_takes_proportionally_longer_than_what_is_simulated(monkeypatch):
    monkeypatch.setattr("bioscan_jax.planning.fleet._SIMULATED_BLOCKS", 100)
    plans = [plan_fleet(rows, TINY, "v3-8", 5, rows_per_second=1.0) for rows in (6_000, 18_000)]
    assert plans[0].outcome == plans[1].outcome
    assert plans[1].hours == pytest.approx(3 * plans[0].hours)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "pass --tokens .* --data.path, or a measured --rows_per_second"),
        (["--tokens", 9999], "--tokens 9999 is outside 2 to"),
        (["--device", "v5e-3", "--tokens", 9], "--device 'v5e-3' is not a known slice"),
        (["--device", "0 x NVIDIA L4", "--tokens", 9], "--device '0 x NVIDIA L4' is unknown"),
        (["--rows", 0], "--rows 0 is too small"),
        (["--rows_per_second", -1], "--rows_per_second -1.0 is out of range"),
        (["--embed.layer", 0, "--tokens", 9], "--embed.layer 0 .* measured --rows_per_second"),
        (["--prices", "absent.csv"], "--prices absent.csv cannot be read"),
        (["--prices", "bad.csv"], "bad.csv is not a table of prices .*columns device and price_per_hour"),
        (["--prices", "bad.json"], "bad.json is not a table of prices"),
        (["--prices", "other.csv"], "has no 'v3-8', only a, b"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("device;price\nv3-8;1\n")
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "other.csv").write_text("device,price_per_hour\na,1\nb,2\n")
    given = ["--model.checkpoint", "random:tiny-v2", "--rows", 100, "--device", "v3-8", "--machines", 1]
    done = call("fleet", "plan", *given, *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(words, done.stderr)


def test_the_command_prints_the_plan():
    given = ["--model.checkpoint", "random:tiny-v2", "--rows", 100, "--device", "v3-8", "--machines", 1, "--tokens", 9]
    assert "machines  1, each v3-8: 8 x TPU v3" in call("fleet", "plan", *given).stdout
