"""Lines on Weights & Biases while a table is made."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dashboards import hide_credentials, history, stored

import bioscan_jax as bj
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.embedding import progress
from bioscan_jax.errors import InputError

ROWS, BLOCK_ROWS = 60, 16
MODEL = bj.ModelConfig(checkpoint="random:tiny-v2")


def embed(directory, mode):
    """Embeds 52 barcodes, two rows without one and six repeats."""
    sequences = simulate(species=13, per_species=4, length=60, seed=0)["dna_sequence"].to_pylist()
    pq.write_table(pa.table({"dna_sequence": [*sequences, None, "", *sequences[:6]]}), directory / "in.parquet")
    data = bj.DataConfig(path=str(directory / "in.parquet"), block_rows=BLOCK_ROWS)
    tracking = bj.TrackingConfig(mode=mode, project="barcodes", name="first")
    sink = bj.SinkConfig(uri=str(directory / "db"))
    return bj.embed(MODEL, data, sink, mesh=bj.MeshConfig(data=1), tracking=tracking, progress=False)


@pytest.fixture(autouse=True)
def _wandb_here(tmp_path, monkeypatch):
    hide_credentials(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)


def test_an_offline_run_has_a_line_for_each_commit_and_says_what_made_the_vectors(tmp_path):
    summary = embed(tmp_path, "offline")
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    lines = history(directory)
    assert [line["embed/rows_done"] for line in lines] == [16, 32, 48, 60, 60]
    assert [line["embed/rows_pending"] for line in lines] == [44, 28, 12, 0, 0]
    last = lines[-1]
    assert (last["embed/vectors"], last["embed/rejects"], last["embed/distinct"]) == (58, 2, summary.counts.distinct)
    assert all(line["hardware/throughput_rows_per_sec"] > 0 for line in lines[:-1])
    assert last["hardware/memory_used_gb"] > 0.01
    run = stored(directory)["run"][0]
    assert (run.project, run.display_name) == ("barcodes", "first")
    assert run.run_group.startswith("sequences ")
    facts = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert facts["provenance"]["weights_sha256"] == summary.provenance["weights_sha256"]
    assert (facts["rows"], facts["resumed_at"], facts["versions"]) == (ROWS, 0, summary.versions)
    assert stored(directory)["exit"][0].exit_code == 0
    assert stored(directory)["metric"][0].step_metric == "embed/rows_done"
    embed(tmp_path, "offline")  # nothing left to do, and nothing to show
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_online_without_a_key_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"^--tracking\.mode online needs an API key"):
        embed(tmp_path, "online")
    assert not (tmp_path / "db").exists()
    assert not (tmp_path / "wandb").exists()
