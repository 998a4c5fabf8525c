"""Exports of a training run, read back."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from support.finetuned import ONE, train

from bioscan_jax import config
from bioscan_jax.checkpoints.head_files import read_heads
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.model.pooling import pool
from bioscan_jax.training.export import export


@pytest.fixture(scope="module")
def run(barcodes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, train(barcodes, directory, loss=config.LossConfig(metadata=True), epochs=1)


def vectors(loaded, ids):
    return pool(loaded.model.hidden_state(ids), ids, "mean", 1)


def loaded_from(checkpoint, adapter=None):
    return load_weights(config.ModelConfig(checkpoint=str(checkpoint), adapter=adapter), make_layout(ONE))


IDS = jnp.asarray(np.random.default_rng(0).integers(6, 4000, (3, 15)))


def test_an_adapter_with_its_heads(run, tmp_path):
    directory, summary = run
    line = export(str(directory), str(tmp_path / "adapter"), mesh=ONE)
    assert f"after step {summary.progress.best_step}" in line
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "label_space.json"),
        *("bioscan_jax_export.json", "README.md"),
    }
    plain = vectors(loaded_from("random:tiny-v2"), IDS)
    adapted = vectors(loaded_from("random:tiny-v2", str(tmp_path / "adapter")), IDS)
    assert np.abs(adapted - plain).max() > 1e-3
    heads = read_heads(tmp_path / "adapter", make_layout(ONE))
    assert [len(names) for names in heads.space.names] == list(summary.taxa.values())
    assert heads.encoder is not None
    found = heads.head(adapted)
    assert found.log_probs[0].shape[0] == 3

    export(str(directory), str(tmp_path / "merged"), format="merged", mesh=ONE)
    merged = vectors(loaded_from(tmp_path / "merged"), IDS)
    np.testing.assert_allclose(merged, adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="not empty"):
        export(str(directory), str(tmp_path / "merged"), format="merged", mesh=ONE)


def test_best_and_last(run, tmp_path):
    directory, summary = run
    for which, step in (("best", summary.progress.best_step), ("last", summary.progress.step)):
        assert f"{which} parameters, after step {step}" in export(
            str(directory), str(tmp_path / which), which=which, mesh=ONE
        )


def test_bad_input(run, tmp_path):
    directory, _ = run
    with pytest.raises(InputError, match=r"run.json: not found; pass the --train.output_dir"):
        export(str(tmp_path), str(tmp_path / "out"), mesh=ONE)
    with pytest.raises(InputError, match="pass --checkpoint with those"):
        export(str(directory), str(tmp_path / "out"), checkpoint="random:tiny-v1", mesh=ONE)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record)[:-9])
    with pytest.raises(InputError, match=r"run.json cannot be read"):
        export(str(copy), str(tmp_path / "out"), mesh=ONE)
    (copy / "run.json").write_text(json.dumps(record | {"decided_by": record["decided_by"] | {"lora": None}}))
    with pytest.raises(InputError, match="has no adapter; pass --format merged"):
        export(str(copy), str(tmp_path / "out"), mesh=ONE)
    (copy / "run.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "best")
    with pytest.raises(InputError, match="best: not found"):
        export(str(copy), str(tmp_path / "out"), mesh=ONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_model(barcodes, tmp_path):
    train(barcodes, tmp_path / "run", mode="full", epochs=1)
    with pytest.raises(InputError, match="trained the whole model and has no adapter"):
        export(str(tmp_path / "run"), str(tmp_path / "adapter"), mesh=ONE)
    export(str(tmp_path / "run"), str(tmp_path / "merged"), format="merged", mesh=ONE)
    plain, trained = vectors(loaded_from("random:tiny-v2"), IDS), vectors(loaded_from(tmp_path / "merged"), IDS)
    assert np.abs(trained - plain).max() > 1e-3
    heads = read_heads(tmp_path / "merged", make_layout(ONE))
    assert heads.encoder is None
