"""metrics.jsonl after kills, a real offline run of Weights & Biases, and the curves."""

import json
import logging
import math
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dashboards import hide_credentials, history, stored

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.config import TrackingConfig
from bioscan_jax.errors import InputError
from bioscan_jax.training.curves import draw_curves
from bioscan_jax.training.tracking import open_tracking

DISABLED = TrackingConfig(mode="disabled")


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path, monkeypatch):
    hide_credentials(tmp_path, monkeypatch)


def write(directory, steps, *, resumed_at=0, numbers=lambda step: {"train/loss": 1 / (step + 1)}, tracking=DISABLED):
    with open_tracking(tracking, directory, settings={}, resumed_at=resumed_at, run_id=None) as tracker:
        for step in steps:
            tracker.log(numbers(step), step)
    return (directory / "metrics.jsonl").read_bytes()


def records(directory):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@given(st.data())
def test_a_file_cut_anywhere_ends_like_that_of_an_uninterrupted_run(data):
    every, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    logged = range(every, steps + 1, every)
    with tempfile.TemporaryDirectory() as home:
        whole = write(Path(home) / "whole", logged)
        cut = whole[: data.draw(st.integers(0, len(whole)))]
        lines = cut.count(b"\n")
        checkpoint = data.draw(st.integers(0, lines * every))
        killed = Path(home) / "killed"
        killed.mkdir()
        (killed / "metrics.jsonl").write_bytes(cut)
        again = write(killed, [step for step in logged if step > checkpoint], resumed_at=checkpoint)
        assert again == whole
        assert [path.name for path in killed.iterdir()] == ["metrics.jsonl"]


def test_a_line_is_on_the_disk_before_the_next_step(tmp_path):
    with open_tracking(DISABLED, tmp_path, settings={}, resumed_at=0, run_id=None) as tracker:
        tracker.log({"train/loss": 0.1}, 7)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"train/global_step": 7, "train/loss": 0.1}\n'


def test_values_are_exact_and_null_if_not_finite(tmp_path):
    numbers = {
        "train/loss": 0.1 + 0.2,
        "train/epoch": 3,
        "train/learning_rate": np.float32(2e-4),
        "metrics/embedding_norm": math.nan,
        "metrics/embedding_std": -math.inf,
        "train/global_step": 5.0,
    }
    write(tmp_path, [5], numbers=lambda step: numbers)
    (record,) = records(tmp_path)
    assert list(record) == ["train/global_step", *list(numbers)[:-1]]
    assert record["train/global_step"] == 5
    assert isinstance(record["train/global_step"], int)
    assert record["train/loss"] == 0.1 + 0.2
    assert np.float32(record["train/learning_rate"]) == np.float32(2e-4)
    assert record["metrics/embedding_norm"] is None
    assert record["metrics/embedding_std"] is None


def test_an_evaluation_repeated_at_the_checkpoint_is_not_written_twice(tmp_path):
    before = write(tmp_path, [1, 2], numbers=lambda step: {"train/loss": 1.0, "eval/loss": 2.0})
    after = write(tmp_path, [2, 3], resumed_at=2, numbers=lambda step: {"eval/loss": 2.0})
    assert after == before + b'{"train/global_step": 3, "eval/loss": 2.0}\n'
    added = write(tmp_path, [3], resumed_at=3, numbers=lambda step: {"eval/genus_accuracy": 0.5})
    assert added == after + b'{"train/global_step": 3, "eval/genus_accuracy": 0.5}\n'


def test_a_file_that_cannot_grow_is_reported(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
        with pytest.raises(InputError, match=r"metrics\.jsonl: File too large"):
            write(tmp_path, range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(tmp_path, range(6, 9), resumed_at=5)  # a torn line is no hindrance
    assert [record["train/global_step"] for record in records(tmp_path)] == list(range(9))


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"train/global_step": "1"}', "\0\0\0"])
def test_a_damaged_line_is_refused_and_the_file_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = '{"train/global_step": 1}\n' + line + '\n{"train/global_step": 2}\n'
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"metrics\.jsonl, line 2: .* is not an object with 'train/global_step'; remove"
    ):
        write(tmp_path, [1], resumed_at=1)
    with pytest.raises(InputError, match="line 2"):
        draw_curves(tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize("asked", ["auto", "disabled"])
def test_disabled_leaves_metrics_alone_and_keeps_the_id_for_later(tmp_path, capfd, caplog, monkeypatch, asked):
    caplog.set_level(logging.INFO, "bioscan_jax")
    monkeypatch.setenv("WANDB_MODE", "disabled" if asked == "auto" else "offline")
    for given_id in (None, "abcd1234"):
        with open_tracking(TrackingConfig(mode=asked), tmp_path, settings={}, resumed_at=0, run_id=given_id) as tracker:
            assert tracker.run_id == given_id
            tracker.log({"train/loss": 1.0}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name == "bioscan_jax"]


@pytest.mark.parametrize(
    ("asked", "environment", "message"),
    [
        ("online", "offline", r"^--tracking\.mode online needs an API key"),
        ("auto", "online", r"^WANDB_MODE=online needs an API key"),
        ("auto", "on", r"^WANDB_MODE=on is not a mode"),
    ],
)
def test_online_without_a_key_is_refused_before_anything_is_written(tmp_path, monkeypatch, asked, environment, message):
    monkeypatch.setenv("WANDB_MODE", environment)
    with pytest.raises(InputError, match=message):
        write(tmp_path / "run", [1], tracking=TrackingConfig(mode=asked))
    assert not (tmp_path / "run").exists()


def test_each_offline_run_of_one_id_holds_all_metrics_from_the_first_step(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "bioscan_jax")
    tracking = TrackingConfig(project="barcodes", name="first")
    settings = {"train": {"epochs": 3}}
    with open_tracking(tracking, tmp_path, settings=settings, resumed_at=0, run_id=None) as tracker:
        run_id = tracker.run_id
        for step in (1, 2, 3):
            tracker.log({"train/loss": 0.1 * step, "train/epoch": 1}, step)
    (first,) = tmp_path.glob("wandb/offline-run-*")
    assert run_id in first.name
    assert history(first) == records(tmp_path)
    run = stored(first)["run"][0]
    assert (run.run_id, run.project, run.display_name, run.resume) == (run_id, "barcodes", "first", False)
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["train"] == {"epochs": 3}
    (metric,) = stored(first)["metric"]
    assert (metric.glob_name, metric.step_metric) == ("*", "train/global_step")
    assert stored(first)["exit"][0].exit_code == 0
    (first / f"run-{run_id}.wandb").write_bytes(b"what a kill left")

    def fail():
        with open_tracking(tracking, tmp_path, settings=settings, resumed_at=2, run_id=run_id) as resumed:
            assert resumed.run_id == run_id
            resumed.log({"eval/loss": 0.3}, 2)
            resumed.log({"train/loss": math.nan}, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with open_tracking(tracking, tmp_path, settings=settings, resumed_at=3, run_id=run_id) as tracker:
        tracker.log({"train/loss": math.nan}, 3)
        tracker.log({"train/loss": 0.4}, 4)
    _, second, third = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert [stored(path)["run"][0].run_id for path in (second, third)] == [run_id] * 2
    assert [stored(path)["exit"][0].exit_code for path in (second, third)] == [1, 0]
    expected = records(tmp_path)
    assert [record["train/global_step"] for record in expected] == [1, 2, 2, 3, 4]
    assert expected[3]["train/loss"] is None
    for path, lines in ((second, expected[:4]), (third, expected)):
        rows = history(path)
        assert math.isnan(rows[3]["train/loss"])
        rows[3]["train/loss"] = None
        assert rows == lines

    assert capfd.readouterr() == ("", "")
    assert [record.message for record in caplog.records if record.name == "bioscan_jax"] == [
        f"Weights & Biases: offline; to upload: wandb sync {path}" for path in (first, second, third)
    ]


@pytest.mark.parametrize("place", ["environment", "netrc"])
def test_a_bad_key_makes_the_run_an_offline_one_and_a_dead_dashboard_does_not_end_it(
    tmp_path, monkeypatch, caplog, place
):
    """The key is too short for wandb to send it, so that nothing leaves the machine."""
    monkeypatch.delenv("WANDB_MODE")
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "short")
    else:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine api.wandb.ai\n  login user\n  password short\n")
        monkeypatch.setenv("NETRC", str(netrc))
    directory = tmp_path / "run"
    with open_tracking(TrackingConfig(), directory, settings={}, resumed_at=0, run_id="abcd1234") as tracker:
        assert tracker.run_id == "abcd1234"
        tracker.log({"train/loss": 1.0}, 1)
        tracker._dashboard._run.finish()
        tracker.log({"train/loss": 0.5}, 2)
        tracker.log({"train/loss": 0.4}, 3)
    (offline,) = directory.glob("wandb/offline-run-*-abcd1234")
    assert history(offline) == records(directory)[:1]
    assert [record["train/loss"] for record in records(directory)] == [1.0, 0.5, 0.4]
    assert "Weights & Biases: not online (" in caplog.text
    assert "must have 40+ characters" in caplog.text
    assert caplog.text.count("no longer logging (") == 1
    assert "all metrics are in metrics.jsonl" in caplog.text


def taxonomy_numbers(step):
    numbers = {"train/loss": 5 / step, "train/loss/genus": 1 / step}
    if step % 10 == 0:
        numbers["eval/loss"] = 6 / step if step != 30 else math.nan
        numbers |= {f"eval/{rank}_accuracy": 1 - 1 / step for rank in RANKS[2:]}
        numbers |= {f"eval/{rank}_majority": 0.2 for rank in RANKS[2:]}
    return numbers


def mlm_numbers(step):
    return {"train/loss": 5 / step if step != 7 else math.nan} | ({"eval/loss": 6 / step} if step % 10 == 0 else {})


def train_numbers(step):
    return {"train/loss": 5 / step}


def unfinished_evaluation(step):
    return {"train/loss": 5 / step, "eval/loss": math.nan}


ORANGE = (255, 127, 14)
CLASS_BLUE = (54, 92, 141)


@pytest.mark.parametrize(
    ("numbers", "panels", "colours"),
    [
        (taxonomy_numbers, 2, {ORANGE: True, CLASS_BLUE: True}),
        (mlm_numbers, 1, {ORANGE: True, CLASS_BLUE: False}),
        (train_numbers, 1, {ORANGE: False, CLASS_BLUE: False}),
        (unfinished_evaluation, 1, {CLASS_BLUE: False}),
    ],
)
def test_the_curves_have_a_panel_for_each_kind_of_metric(tmp_path, numbers, panels, colours):
    from matplotlib.image import imread

    write(tmp_path, range(1, 61), numbers=numbers)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/glo')
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    pixels = np.round(imread(path)[:, :, :3] * 255).astype(int)
    assert pixels.shape[:2] == (60 + 540 * panels, 1500)
    for colour, there in colours.items():
        assert bool((pixels == colour).all(axis=-1).any()) == there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        draw_curves(tmp_path)
    write(tmp_path, [1], numbers=lambda step: {"train/loss": math.nan, "train/epoch": 1})
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()
