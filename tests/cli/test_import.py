"""What `import bioscan_jax` costs, and that each public name is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import SCRIPTS

import bioscan_jax

MEASURE = """
import json, sys
import bioscan_jax
given = set(sys.modules)
bioscan_jax.EmbedConfig()
heavy = ("jax", "flax", "numpy", "pyarrow", "lance", "lancedb", "wandb", "sklearn", "matplotlib", "duckdb", "torch",
         "transformers", "huggingface_hub", "grain", "orbax")
print(json.dumps([name for name in heavy if name in given]))
"""

MODEL_SIDE = """
import json, sys
absent = ("lance", "lancedb", "grain", "duckdb", "wandb", "jsonargparse", "beartype", "edlib", "sklearn", "matplotlib")
sys.path.insert(0, sys.argv[1])
sys.modules |= dict.fromkeys(absent)  # an import of one of them fails
import bioscan_jax.checkpoints.load, bioscan_jax.embedding.encoder, bioscan_jax.model.transformer
import bioscan_jax.devices.profiling, bioscan_jax.training.state, bioscan_jax.training.step
import benchmarks.device, benchmarks.finetuning, benchmarks.peers
from jax._src import xla_bridge
started = len(xla_bridge._backends)
import bioscan_jax as bj
vectors = bj.load("random:tiny-v2").encode(["ACGTACGTAC", "TTGACA"])
print(json.dumps([["torch"] if "torch" in sys.modules else [], started, vectors.shape]))
"""


def run(program: str):
    return json.loads(
        subprocess.run([sys.executable, "-c", program, SCRIPTS], capture_output=True, text=True, check=True).stdout
    )


def test_the_import_brings_nothing_heavy():
    assert run(MEASURE) == []


def test_the_model_side_needs_no_table_and_starts_no_backend():
    """As on a machine with JAX, pyarrow and PyTorch alone, where tests/device and the benchmark `device` run."""
    assert run(MODEL_SIDE) == [[], 0, [2, 64]]


@pytest.mark.parametrize("name", bioscan_jax.__all__)
def test_each_public_name_is_there_and_documented(name):
    value = getattr(bioscan_jax, name)
    if name != "PRESETS":
        assert value.__name__ == name
        assert value.__doc__


def test_no_public_name_is_a_folder_s_or_a_module_s():
    """An import of the module would put it in the place of the name."""
    package = Path(bioscan_jax.__file__).parent
    assert not {path.stem for path in package.iterdir()} & set(bioscan_jax.__all__)


@pytest.mark.parametrize("late", ["print('late')", "threading.Timer(0.2, print, ['late']).start()"])
def test_a_command_ends_with_its_code_after_threads_and_exit_handlers(late: str) -> None:
    program = (
        f"import atexit, threading; from bioscan_jax.cli import run_script; atexit.register(print, 'handled'); {late}"
    )
    ended = subprocess.run(
        [sys.executable, "-c", f"{program}; run_script('compact', ['--nothing'])"], capture_output=True
    )
    assert (ended.returncode, sorted(ended.stdout.split())) == (2, [b"handled", b"late"])
