"""The start-up path."""

import json
import subprocess
import sys

MEASURE = """
import json, sys, time
import jax
start = time.process_time()
import bioscan_jax
seconds = time.process_time() - start
from jax._src import xla_bridge
heavy = [m for m in ("torch", "transformers", "lance", "lancedb", "wandb", "huggingface_hub", "matplotlib") if m in sys.modules]
print(json.dumps([seconds, heavy, len(xla_bridge._backends)]))
"""


def test_the_import_is_light_and_starts_no_backend():
    """Under one second of processor time beyond jax itself, in the best of five starts: a busy machine adds to it."""
    seconds = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
        one, heavy, backends = json.loads(run.stdout)
        assert heavy == []
        assert backends == 0
        seconds.append(one)
    assert min(seconds) < 1.0
