"""Executes the notebooks on the demo in a fresh directory, and interrupts one."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import lance
import pyarrow.parquet as pq
import pytest
from support.embed_runs import Table, environment, rows_there, unnamed_files
from support.places import ROOT

import bioscan_jax as bj
from bioscan_jax.barcodes.simulate import write_simulated

NOTEBOOKS = sorted((ROOT / "scripts").glob("*.ipynb"))
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_stored(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def client(cells, directory: Path):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    book = new_notebook(cells=[new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    resources = {"metadata": {"path": str(directory)}}
    return NotebookClient(book, timeout=300, kernel_name="python3", resources=resources, coalesce_streams=True)


def outputs_of(path: Path, directory: Path, skipped: str = "") -> str:
    """Executes a notebook but for the cells with a tag, and returns its outputs as text and HTML."""
    import nbformat

    cells = [cell for cell in nbformat.read(path, 4).cells if skipped not in cell.metadata.get("tags", [])]
    executed = client(cells, directory)
    executed.execute(env=environment() | OFFLINE)
    if kept := os.environ.get("BIOSCAN_EXECUTED_NOTEBOOKS"):
        nbformat.write(executed.nb, Path(kept) / path.name)
    outputs = [output for cell in executed.nb.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    texts += [text for output in outputs if "data" in output for text in map(str, output.data.values())]
    assert "Warning" not in "".join(texts)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "\n".join(texts)


@pytest.mark.notebook
def test_colab_from_barcodes_to_a_bundle(tmp_path):
    shown = outputs_of(ROOT / "scripts" / "colab.ipynb", tmp_path)
    assert "1 x cpu" in shown
    home = tmp_path / "bioscan"
    assert lance.dataset(str(home / "vectors" / "sequences.lance")).count_rows() == 560
    names = pq.read_table(home / "names.parquet")
    assert len(names) == 70
    assert names["species"].null_count < 10
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (home / "adapter").iterdir()}
    assert not bj.verify_bundle(str(tmp_path / "bioscan_bundle")).faults
    bj.import_bundle(str(tmp_path / "bioscan_bundle"), str(tmp_path / "laptop"))
    assert bj.query("SELECT count(*) FROM sequences", str(tmp_path / "laptop"))[0][0].as_py() == 560
    for said in ("Hemiceras losa", "srcdoc", "adapter: peft of best parameters", "9 of 9 files are whole"):
        assert said in shown
    for lost in ("bioscan", "bioscan_bundle", "queries.parquet"):  # with the machine; the copy brings all back
        path = tmp_path / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = outputs_of(ROOT / "scripts" / "colab.ipynb", tmp_path)
    assert again.count("complete before this run: nothing was left to do") == 4  # embed and finetune, as text and HTML
    assert "9 of 9 files are whole" in again
    assert "<script" not in shown + again


@pytest.mark.notebook
def test_from_a_stick_to_names_and_a_report(tmp_path):
    shown = outputs_of(ROOT / "scripts" / "stick_to_names.ipynb", tmp_path)
    assert bj.query("SELECT count(*) FROM sequences", str(tmp_path / "laptop" / "vectors"))[0][0].as_py() == 490
    assert len(pq.read_table(tmp_path / "laptop" / "names.parquet")) == 70
    assert (tmp_path / "laptop" / "report.html").read_text().startswith("<!doctype html>")
    assert "490 rows and 0 rejects inserted" in shown


@pytest.mark.notebook
def test_a_tpu_vm_without_a_tpu(tmp_path):
    for _ in range(2):
        shown = outputs_of(ROOT / "scripts" / "tpu_vm_2.5b.ipynb", tmp_path, skipped="tpu")
        assert "1,024 x 128 tokens" in shown
        assert lance.dataset(str(tmp_path / "nt" / "vectors" / "sequences.lance")).count_rows() == 560
    assert "complete before this run: nothing was left to do" in shown


EMBED = """
import bioscan_jax as bj
model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.parquet", block_rows=32)
bj.embed(model, data, bj.SinkConfig(uri={uri!r}), bj.EmbedConfig(max_shapes=2))
"""


@pytest.mark.notebook
def test_the_same_cell_continues_after_an_interrupt_a_termination_and_a_kill(tmp_path):
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    write_simulated(str(tmp_path / "barcodes.parquet"), species=300, per_species=10, length=300, seed=0)
    table = tmp_path / "stopped"

    def stop(kernel: int, number: int, rows: int) -> None:
        while rows_there(table) < rows:
            time.sleep(0.02)
        os.kill(kernel, number)

    def run(stopped_by: list[int]) -> str:
        """Executes the cell once more than it is stopped, in one kernel."""
        executed = client([EMBED.format(uri="stopped")], tmp_path)
        with executed.setup_kernel(env=environment()):
            for number in stopped_by:
                kernel = executed.km.provisioner.pid
                thread = threading.Thread(target=stop, args=(kernel, number, rows_there(table) + 200), daemon=True)
                thread.start()
                with pytest.raises((CellExecutionError, DeadKernelError)) as raised:
                    executed.execute_cell(executed.nb.cells[0], 0)
                thread.join()
                assert 0 < rows_there(table) < 3000
                if number != signal.SIGKILL:
                    assert "Interrupted: stopped with" in str(raised.value)
                    assert "the same cell continues from there" in str(raised.value)
            if signal.SIGKILL not in stopped_by:
                executed.execute_cell(executed.nb.cells[0], 0)
        return str(executed.nb.cells[0].outputs)

    run([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    assert "of them before this run" in run([])
    executed = client([EMBED.format(uri="whole")], tmp_path)
    executed.execute(env=environment())
    assert Table.read(table).differences(Table.read(tmp_path / "whole")) == []
    assert unnamed_files(table) == []


FINETUNE = """
import bioscan_jax as bj
bj.finetune(
    bj.ModelConfig(checkpoint="random:tiny-v2"),
    bj.ExamplesConfig(path="demo:coi", max_tokens=32),
    train=bj.TrainConfig(output_dir="run", epochs=20, max_shapes=1, log_every=1),
    tracking=bj.TrackingConfig(mode="disabled"),
)
"""


@pytest.mark.notebook
def test_training_that_is_interrupted_is_continued_by_the_same_cell(tmp_path):
    from nbclient.exceptions import CellExecutionError

    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop(kernel: int) -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 20:
            time.sleep(0.02)
        os.kill(kernel, signal.SIGINT)

    executed = client([FINETUNE], tmp_path)
    with executed.setup_kernel(env=environment()):
        thread = threading.Thread(target=stop, args=(executed.km.provisioner.pid,), daemon=True)
        thread.start()
        with pytest.raises(CellExecutionError) as raised:
            executed.execute_cell(executed.nb.cells[0], 0)
        thread.join()
        executed.execute_cell(executed.nb.cells[0], 0)
    stopped = re.search(r"Interrupted: stopped after step ([\d,]+) of 340.*the same cell continues", str(raised.value))
    assert stopped is not None
    assert f"340 ({stopped[1]} of them before this run)" in str(executed.nb.cells[0].outputs)
