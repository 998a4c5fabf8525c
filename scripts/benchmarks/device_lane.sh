#!/usr/bin/env bash
# What to run once on a fresh machine with an accelerator, in under 10 minutes: `bash scripts/benchmarks/device_lane.sh DIR`
# writes DIR/tests.txt, DIR/device.txt and DIR/device.json. Needs Python 3.11 or newer with jax (for the accelerator),
# flax, optax, orbax-checkpoint, pyarrow, jaxtyping, lazy_loader, transformers, torch, peft and pytest; not lancedb,
# grain, duckdb, jsonargparse or beartype, which is why pytest ignores its flags in pyproject.toml.
set -uo pipefail
out=$(mkdir -p "${1:-.}" && cd "${1:-.}" && pwd)
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/scripts:$PWD/tests" PYTHONUNBUFFERED=1
timeout 180 python3 -m pytest -o addopts= -o filterwarnings=default -q -m device tests/device --durations=5 2>&1 | tee "$out/tests.txt"
timeout 400 python3 -c "
from benchmarks.device import device
from benchmarks.figures import describe, write_json
figures = device(minutes=6.0, peers=True)
print(describe(figures))
write_json(figures, '$out/device.json')
" 2>&1 | tee "$out/device.txt"
