"""Runs the 2.5B model at full size: python tests/headline.py DIRECTORY (about 17 GB of disk, 12 GB of memory).

Writes a checkpoint of the NT-2.5B architecture with random float32 weights in two PyTorch shards (10 GB; needs the
parity extra). Then runs the scripts, each in a process of its own: embeds 16 barcodes in bfloat16, converts the
checkpoint, and embeds them with the converted one. Prints seconds and peak resident memory of each, and whether the
vectors are equal.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.places import SCRIPTS

from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.keys import abstract_model, published_names
from bioscan_jax.model.config import PRESETS

PRESET = "nt-v1-2.5b"


def say(line: str) -> None:
    """Prints a line without buffering."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the published parameter names and their shapes, [out, in]."""
    config = PRESETS[PRESET]
    ours = {
        path: v.get_value().shape
        for path, v in nnx.to_flat_state(nnx.state(abstract_model(config, jnp.float32, lm_head=True)))
    }
    found = {}
    for row in published_names(config, lm_head=True):
        shape = ours[row.path]
        stacked = "{}" in row.name
        one = shape[1:] if stacked else shape
        for name in row.names(config.num_hidden_layers):
            found[name] = tuple(one[::-1]) if row.transposed else tuple(one)
    return found


def make(directory: Path) -> None:
    """Writes two shards of about 5 GB, one after the other."""
    import torch

    directory.mkdir(parents=True)
    config = PRESETS[PRESET]
    (directory / "config.json").write_text(config.to_json())
    (directory / "vocab.txt").write_text(Vocabulary.published("v1").text())
    names, weight_map = sorted(shapes().items()), {}
    generator = torch.Generator().manual_seed(0)
    half, shards, size = sum(int(np.prod(s)) for _, s in names) // 2, [{}, {}], 0
    for name, shape in names:
        shards[size > half][name] = shape
        size += int(np.prod(shape))
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        tensors = {}
        for name, shape in shard.items():
            norm = name.endswith("weight") and ("LayerNorm" in name or "layer_norm" in name)
            tensors[name] = torch.ones(shape) if norm else torch.randn(shape, generator=generator) * 0.02
        torch.save(tensors, directory / file)
        weight_map |= dict.fromkeys(shard, file)
        del tensors
    index = {"metadata": {"total_size": 4 * size}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def run(what: str, script: str, **flags: object) -> None:
    """Runs a script; prints its seconds and peak resident memory."""
    command = [sys.executable, str(SCRIPTS / script), *(f"--{name}={value}" for name, value in flags.items())]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what}: {' '.join(command)} ended with {status}: {output}")
    seconds = next((line for line in output.splitlines() if "seconds" in line), "").strip()
    say(f"{what}: {time.monotonic() - begun:.1f} s, {usage.ru_maxrss / 2**20:.2f} GiB peak resident memory; {seconds}")


def main() -> None:
    """Creates the files that are missing, and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    published, converted = directory / "published", directory / "converted"
    if not published.exists():
        process = os.fork()  # so that its memory is freed
        if process == 0:
            make(published)
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            raise SystemExit("the checkpoint could not be written")
    say(f"published: {sum(f.stat().st_size for f in published.iterdir()) / 1e9:.2f} GB")
    barcodes = directory / "barcodes.parquet"
    write_simulated(str(barcodes), species=4, per_species=4, length=658, seed=0)
    common = {
        "data.path": barcodes,
        "data.max_tokens": 1000,
        "model.dtype": "bfloat16",
        "mesh.compilation_cache": "null",
    }
    run("embed, .bin", "embed.py", **{"model.checkpoint": published, "sink.uri": directory / "from_bin"}, **common)
    if not converted.exists():
        run("convert", "convert.py", **{"model.checkpoint": published, "model.dtype": "bfloat16", "output": converted})
    run(
        "embed, converted",
        "embed.py",
        **{"model.checkpoint": converted, "sink.uri": directory / "from_orbax"},
        **common,
    )
    import lance  # not before the fork above

    tables = [
        lance.dataset(str(directory / name / "sequences.lance")).to_table() for name in ("from_bin", "from_orbax")
    ]
    same = tables[0]["vector"].combine_chunks().equals(tables[1]["vector"].combine_chunks())
    say(f"16 vectors of {tables[0]['vector'].type.list_size} from each; equal to the bit: {same}")


if __name__ == "__main__":
    main()
