"""Fine-tuning from a Parquet file to a run's directory, interrupted and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.finetuned import ONE, check_same_run, metrics_of, train
from support.killed import run_killed
from support.places import SCRIPTS
from support.traces import traced_steps

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.devices.profiling import TRACED_STEPS, WARM_UP
from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.location import local_copy
from bioscan_jax.training.examples import BASES
from bioscan_jax.training.export import export
from bioscan_jax.training.run import _scratch
from bioscan_jax.training.tracking import Tracker


def stopping_at(monkeypatch, step):
    """Sends this process a SIGTERM once that step is logged."""
    log = Tracker.log

    def stop(self, numbers, at):
        log(self, numbers, at)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", stop)


@pytest.fixture(scope="module")
def whole(barcodes, tmp_path_factory):
    """An uninterrupted run, of which some steps are traced: the runs without a trace must give the same."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return directory, train(barcodes, directory, tracking="offline", profile=str(directory.parent / "trace"))


def test_a_whole_run(whole, barcodes):
    directory, summary = whole
    steps = summary.progress.step
    assert steps == 3 * -(-summary.rows["train"] // 4)
    assert sum(summary.rows.values()) == 72
    assert {p.name for p in directory.iterdir()} >= {
        *("run.json", "label_space.json", "metrics.jsonl", "curves.png", "checkpoints", "best", "wandb")
    }
    assert not list(directory.glob(".examples*"))
    space = LabelSpace.load(directory / "label_space.json")
    assert summary.taxa["species"] == len(space.names[6])
    training = [line for line in metrics_of(directory) if "train/loss" in line]
    assert [line["train/global_step"] for line in training] == list(range(1, steps + 1))
    first = training[0]
    names = {"train/loss", "train/learning_rate", "train/epoch", "train/global_step", "train/loss/species"}
    names |= {"metrics/embedding_norm", "metrics/embedding_mean", "metrics/embedding_std", "train/loss/kingdom"}
    assert names <= first.keys()
    given = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    assert {"hardware/memory_used_gb", "hardware/throughput_seqs_per_sec"} <= given.keys()
    assert "hardware/tpu_utilization" not in given  # the peak of this CPU is not known
    evaluated = [line for line in metrics_of(directory) if "eval/loss" in line]
    assert [line["train/global_step"] for line in evaluated] == [steps // 3, 2 * steps // 3, steps]
    assert "eval/species_accuracy" in evaluated[0]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    best = min(evaluated, key=lambda line: line["eval/loss"])
    assert summary.progress.best_step == best["train/global_step"]
    assert [p.name for p in (directory / "best").iterdir()] == [str(summary.progress.best_step)]
    assert "all epochs done" in str(summary)
    assert "LoRA" not in str(summary)
    first = 1 + WARM_UP + 1
    assert traced_steps(directory.parent / "trace", "train") == list(range(first, first + TRACED_STEPS))


def test_a_finished_run_has_nothing_left_to_do(whole, barcodes):
    directory, summary = whole
    again = train(barcodes, directory, tracking="offline")
    assert "complete before this run: nothing was left to do" in str(again)
    assert again.progress == summary.progress
    assert [line["train/global_step"] for line in metrics_of(directory)][-1] == again.progress.step


@pytest.mark.parametrize("step", [pytest.param(7, marks=pytest.mark.slow), 14])
def test_a_stopped_run_continues_to_the_same_result(whole, barcodes, tmp_path, monkeypatch, step):
    """In the middle of an epoch, and between its last step and its evaluation."""
    directory, summary = whole
    assert summary.progress.step == 3 * 14
    with monkeypatch.context() as patch:
        stopping_at(patch, step)
        with pytest.raises(Interrupted, match=rf"stopped after step {step} of .*the same command continues") as stopped:
            train(barcodes, tmp_path / "run")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    resumed = train(barcodes, tmp_path / "run")
    assert resumed.before == step
    check_same_run(tmp_path / "run", directory)


@pytest.mark.parametrize("exists", [True, False], ids=["a run", "no run yet"])
def test_what_was_converted_from_fasta_stays_until_the_run_is_finished(tmp_path, exists):
    run, place = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    if exists:
        (run / "run.json").touch()

    def leave(error: Exception | None, scratch: str | None) -> Path:
        with suppress(Interrupted), _scratch(run, scratch) as directory:
            for name in ("input.parquet", BASES):
                (directory / name).touch()
            if error is not None:
                raise error
        return directory

    stopped = Interrupted("stopped", signal.SIGTERM)
    assert [path.name for path in leave(stopped, None).glob("*")] == ["input.parquet"] * exists
    assert not leave(None, None).exists()
    assert leave(stopped, str(place)).parent == place
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_a_bucket_continues_on_a_machine_with_an_empty_disk(whole, barcodes, tmp_path, monkeypatch):
    url = "memory://runs/coi"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    with monkeypatch.context() as patch:
        stopping_at(patch, 20)
        with pytest.raises(Interrupted, match="stopped after step 20"):
            train(barcodes, url)
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert train(barcodes, url).before == 20
    copied = local_copy(url, "run")
    check_same_run(copied, whole[0])
    assert {path.name for path in copied.iterdir()} == {
        *("run.json", "label_space.json", "metrics.jsonl", "curves.png", "checkpoints", "best")
    }
    with pytest.raises(InputError, match="memory://runs/coi is the run of another configuration"):
        train(barcodes, url, learning_rate=0.02)
    written = export(url, "memory://runs/adapter", mesh=ONE)
    assert written == export(str(whole[0]), str(tmp_path / "adapter"), mesh=ONE).replace(
        str(tmp_path / "adapter"), "memory://runs/adapter"
    )
    theirs = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert fsspec.filesystem("memory").cat_file("runs/adapter/adapter_model.safetensors") == theirs


@pytest.mark.slow
def test_a_run_killed_at_any_moment_continues_to_the_same_result(whole, barcodes, tmp_path):
    """Before a line of metrics, while a checkpoint is being written, and between an evaluation and its best checkpoint."""
    arguments = {"barcodes": str(barcodes), "directory": str(tmp_path / "run")}
    last = {"call": "support.finetuned:train", "args": arguments}
    killed = last | {"args": arguments | {"save_minutes": 0.0}}
    moments = [
        {"at": "bioscan_jax.training.tracking:Tracker.log", "nth": 5},
        {"at": "bioscan_jax.training.state:Checkpoints.save", "nth": 6, "after": True},
        {"at": "bioscan_jax.training.state:Checkpoints.save_best"},
    ]
    assert run_killed([*(killed | moment for moment in moments), last], tmp_path) == [signal.SIGKILL] * 3 + [0]
    check_same_run(tmp_path / "run", whole[0])


def test_another_configuration_is_refused(whole, barcodes, tmp_path):
    directory, _ = whole
    with pytest.raises(InputError, match=r"is the run of another configuration: train.learning_rate 0.01 -> 0.02"):
        train(barcodes, directory, learning_rate=0.02)
    with pytest.raises(InputError, match="another configuration: .*data.validation 0.25 -> 0.5"):
        train(barcodes, directory, data={"validation": 0.5})
    with pytest.raises(InputError, match="to train further, bioscan export --format merged and pass that"):
        train(barcodes, directory, epochs=99)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json cannot be read"):
        train(barcodes, tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops(barcodes, tmp_path):
    """A learning rate far too high: earlier checkpoints are kept, and the message names the batch."""
    with pytest.raises(
        InputError, match=r"is (nan|inf) at step \d+ \(epoch 1, batch \d+ of \d+; its first row is .*row"
    ):
        train(barcodes, tmp_path / "run", learning_rate=1e30, warmup_steps=1, clip_norm=1e30, save_minutes=0.0)
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    found = metrics_of(tmp_path / "run")
    assert steps
    assert max(steps) <= len(found)
    assert all(np.isfinite(line["train/loss"]) for line in found)


@pytest.mark.slow
def test_cosine_and_contrastive_losses_fall_and_a_killed_run_repeats_them(barcodes, tmp_path):
    """With genera together, shifted starts and substitutions; killed while a checkpoint is being written."""
    settings = {"loss": {"head": "cosine", "scale": 8.0, "contrastive": 0.5}, "batch_size": 8, "sampler": "genera"}
    settings |= {"species_per_genus": 2, "start_phase": 0.5, "substitutions": 0.02, "epochs": 4}
    calls = []
    for name, extra in (("whole", {}), ("killed", {"save_minutes": 0.0})):
        arguments = {"barcodes": str(barcodes), "directory": str(tmp_path / name)} | settings
        calls.append({"call": "support.finetuned:train", "args": arguments | extra})
    whole, killed = calls
    moment = {"at": "bioscan_jax.training.state:Checkpoints.save", "nth": 6, "after": True}
    assert run_killed([whole, killed | moment, killed], tmp_path) == [0, signal.SIGKILL, 0]
    check_same_run(tmp_path / "killed", tmp_path / "whole")
    training = [line for line in metrics_of(tmp_path / "whole") if "train/loss" in line]
    for name in ("train/loss", "train/loss/contrastive", "train/loss/genus"):
        values = [line[name] for line in training]
        assert np.mean(values[-5:]) < np.mean(values[:5])


def test_bad_input(barcodes, tmp_path):
    with pytest.raises(InputError, match="--train.output_dir nosuch://x: Protocol not known"):
        train(barcodes, "nosuch://x")
    with pytest.raises(InputError, match="--data.max_tokens 3000 exceeds the 2048 positions"):
        train(barcodes, tmp_path / "a", data={"max_tokens": 3000})
    with pytest.raises(InputError, match="--lora.targets 'dense' is unknown"):
        train(barcodes, tmp_path / "a", lora=config.LoRAConfig(targets=("dense",)))
    assert not (tmp_path / "a" / "run.json").exists()  # the corrected command may use the directory
    with pytest.raises(InputError, match="--loss.metadata needs labels"):
        train(barcodes, tmp_path / "b", objective="mlm", loss=config.LossConfig(metadata=True))
    with pytest.raises(InputError, match="--train.balance needs labels"):
        train(barcodes, tmp_path / "b", objective="mlm", balance="species")
    with pytest.raises(InputError, match="--loss.contrastive needs labels"):
        train(barcodes, tmp_path / "b", objective="mlm", loss=config.LossConfig(contrastive=1.0))
    table = pq.read_table(barcodes)
    pq.write_table(table.drop_columns(["depth"]), tmp_path / "surface.parquet")
    with pytest.raises(InputError, match="there is no column depth, which metadata needs"):
        train(tmp_path / "surface.parquet", tmp_path / "c", loss=config.LossConfig(metadata=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.* --train.output_dir"):
        train(barcodes, tmp_path / "file")
    with pytest.raises(InputError, match="--train.output_dir is empty"):
        train(barcodes, "")
    pq.write_table(table.select(["sequence_id", "dna_sequence"]), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="no labels: there is neither a column 'taxonomy'"):
        train(tmp_path / "bare.parquet", tmp_path / "d")


def test_a_metadata_weight_implies_metadata():
    assert not config.LossConfig().with_metadata
    assert config.LossConfig(metadata=True).metadata_share == 0.3
    assert config.LossConfig(metadata_weight=0.2).with_metadata
    assert config.LossConfig(metadata_weight=0.2).metadata_share == 0.2


@pytest.mark.parametrize(
    ("make", "settings", "line"),
    [
        (
            config.LossConfig,
            {"metadata": False, "metadata_weight": 0.2},
            "--loss.metadata_weight 0.2 needs --loss.metadata",
        ),
        (config.LossConfig, {"metadata_weight": 1.0}, "--loss.metadata_weight 1.0 is not between 0 and 1"),
        (config.LossConfig, {"rank_weights": (0.0,) * 7}, "--loss.rank_weights .* must be at least 0, and not all 0"),
        (
            config.LossConfig,
            {"rank_weights": (float("nan"), *(1.0,) * 6)},
            "--loss.rank_weights .nan, 1.0.* at least 0",
        ),
        (config.LossConfig, {"scale": 0.0}, "--loss.scale 0.0 must be more than 0"),
        (config.LossConfig, {"contrastive": -1.0}, "--loss.contrastive -1.0 must be at least 0"),
        (config.TrainConfig, {"sampler": "genera", "batch_size": 12}, "--train.batch_size 12 .* a multiple of 8"),
        (config.TrainConfig, {"sampler": "genera", "balance": "order"}, "--train.balance order .* leave one out"),
        (config.LoRAConfig, {"alpha": float("inf")}, "--lora.alpha inf must be more than 0"),
        (config.TrainConfig, {"seed": -1}, "--train.seed -1 is too small; pass at least 0"),
        (config.TrainConfig, {"weight_decay": -0.1}, "--train.weight_decay -0.1 must be at least 0"),
        (config.TrainConfig, {"learning_rate": float("nan")}, "--train.learning_rate nan must be more than 0"),
    ],
)
def test_invalid_settings_are_refused(make, settings, line):
    with pytest.raises(InputError, match=line):
        make(**settings)


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(barcodes, tmp_path):
    """Over 420 steps with a checkpoint each and 30 evaluations, the last third uses no more than the middle third."""
    train(barcodes, tmp_path / "run", epochs=30, log_every=5, save_minutes=0.0)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    used = np.array([line["hardware/memory_used_gb"] for line in found if "train/loss" in line])
    _, middle, last = np.array_split(used, 3)
    assert len(last) > 30
    assert np.median(last) - np.median(middle) < 0.02


@pytest.mark.slow
def test_early_stopping_and_no_validation(barcodes, tmp_path):
    summary = train(barcodes, tmp_path / "early", learning_rate=1e-12, epochs=9, patience=2)
    assert "no lower validation loss for 2 epoch(s)" in str(summary)
    assert summary.progress.step < 9 * 14
    summary = train(barcodes, tmp_path / "none", data={"validation": 0.0}, epochs=1)
    assert "there are no validation rows" in str(summary)
    assert not list((tmp_path / "none" / "best").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("head", ["marginal", "independent"])
def test_a_whole_model_learns(tmp_path, head):
    """Far above the commonest taxon, and rising, on rows that were not trained on."""
    write_simulated(str(tmp_path / "b.parquet"), species=30, per_species=16, length=240, seed=0)
    chosen = {"mode": "full", "epochs": 12, "learning_rate": 3e-3, "batch_size": 16, "log_every": 100}
    chosen |= {"reverse_complement": 0.0, "subsequence": 0.0}
    summary = train(tmp_path / "b.parquet", tmp_path / "run", loss=config.LossConfig(head=head), **chosen)
    assert summary.taxa["family"] > 1
    evaluated = [line for line in metrics_of(tmp_path / "run") if "eval/loss" in line]
    for rank in ("family", "genus", "species"):
        found = [line[f"eval/{rank}_accuracy"] for line in evaluated]
        assert found[-1] > evaluated[-1][f"eval/{rank}_majority"] + 0.2
        assert found[-1] > found[0]


@pytest.mark.slow
def test_masked_language_modelling_needs_no_labels(barcodes, tmp_path):
    table = pq.read_table(barcodes).select(["sequence_id", "dna_sequence"])
    pq.write_table(table, tmp_path / "bare.parquet")
    summary = train(tmp_path / "bare.parquet", tmp_path / "run", mode="full", objective="mlm")
    evaluated = [line["eval/loss"] for line in metrics_of(tmp_path / "run") if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0] < 9.0
    assert summary.taxa == {}
    assert not (tmp_path / "run" / "label_space.json").exists()


@pytest.mark.slow
def test_a_run_continues_on_other_devices(whole, barcodes, tmp_path, monkeypatch):
    """8, then 4, then 1: the losses agree within 1e-5 with those of one device."""
    directory, summary = whole
    meshes = [
        config.MeshConfig(data=8, params="fsdp", compilation_cache=None),
        config.MeshConfig(data=4, compilation_cache=None),
    ]
    for mesh, step in zip(meshes, (6, 21), strict=True):
        with monkeypatch.context() as patch:
            stopping_at(patch, step)
            with pytest.raises(Interrupted):
                train(barcodes, tmp_path / "run", mesh=mesh)
    resumed = train(barcodes, tmp_path / "run")
    assert resumed.before == 21
    ours, theirs = (
        [x["train/loss"] for x in metrics_of(d) if "train/loss" in x] for d in (tmp_path / "run", directory)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert jax.device_count() == 8


def test_the_script_refuses_in_one_line(barcodes, tmp_path):
    table = pq.read_table(barcodes)
    index = table.schema.get_field_index("latitude")
    wrong = table.set_column(index, "latitude", pa.array([400.0] * table.num_rows))
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    script = SCRIPTS / "finetune.py"
    flags = {"model.checkpoint": "random:tiny-v2", "data.path": tmp_path / "wrong.parquet", "loss.metadata": "true"}
    flags |= {"train.output_dir": tmp_path / "run", "mesh.compilation_cache": "null"}
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    where = f"{tmp_path}/wrong.parquet row 0"
    assert last.startswith(f"error: the latitude 400 of {where} is outside -90 to 90 (72 such ")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("[!.]*"))
