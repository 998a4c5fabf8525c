"""Loading a checkpoint: seconds and host memory, ours and those of transformers."""

import dataclasses
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks.checkpoints import write_random
from benchmarks.figures import Figures, at_least, in_a_process, require, rounded, settle
from bioscan_jax import config
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.embedding.summary import peak_host_bytes, resident_bytes
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS

_HERE = "benchmarks.loading"
_SHAPE = PRESETS["nt-v1-500m"]


def load(gib: float = 0.5, form: Literal["safetensors", "bin"] = "bin", seed: int = 0, repeats: int = 3) -> Figures:
    """Compare loading a float32 checkpoint of the v1 architecture with transformers' from_pretrained.

    Each load is a process of its own, in turns, with the file in the page cache and as much memory as it needs touched
    by an earlier process, since on a virtual machine the first touch of a page may take longer than everything else.
    The file lies where the hub's client stores it, named by its sha256; for `ours_local` it is a plain file, whose
    sha256 is computed during loading, since provenance needs it. Seconds exclude imports; those of `ours_local` include
    the sha256. Peak memory is that of the whole process, and `grown` the increase over the memory before the load.

    Args:
        gib: Size of the file, rounded to whole layers of the 500M model.
        form: Format of the file.
        seed: Random seed of the weights.
        repeats: Runs of each.

    Raises:
        InputError: A number is too small, or PyTorch is not installed.
    """
    at_least(repeats=(repeats, 1))
    layers = round(gib * 2**30 / 4 / (12 * _SHAPE.hidden_size**2))
    if layers < 1:
        raise InputError(f"--gib {gib} is too small; pass at least 0.1")
    require("torch")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        in_a_process(f"{_HERE}:write", directory=str(checkpoint), layers=layers, seed=seed)
        if form == "bin":
            in_a_process(f"{_HERE}:as_bin", directory=str(checkpoint))
        file = _as_in_the_hub_cache(checkpoint)
        size = file.stat().st_size
        local = Path(directory) / "local"
        shutil.copytree(checkpoint, local, copy_function=lambda of, to: os.link(os.path.realpath(of), to))
        loads = {
            "ours": ("load_ours", checkpoint),
            "ours_local": ("load_ours", local),
            "transformers": ("load_transformers", checkpoint),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
        for _ in range(repeats):
            for name, (function, at) in loads.items():
                settle(2 * size)
                runs[name].append(in_a_process(f"{_HERE}:{function}", directory=str(at)))
    found: Figures = {"file": file.name, "gib": rounded(size / 2**30), "layers": layers, "repeats": repeats}
    for key in ("seconds", "peak_gib", "grown_gib"):
        for name, of in runs.items():
            found[f"{name}_{key}"] = rounded(statistics.median(run[key] for run in of))
    pairs = list(zip(runs["ours"], runs["transformers"], strict=True))
    for key in ("seconds", "peak_gib", "grown_gib"):
        found[f"{key}_ratio_theirs_to_ours"] = rounded(statistics.median(b[key] / a[key] for a, b in pairs))
    return found


def write(directory: str, layers: int, seed: int) -> None:
    """Writes the checkpoint."""
    write_random(Path(directory), dataclasses.replace(_SHAPE, num_hidden_layers=layers), seed)


def as_bin(directory: str) -> None:
    """Converts model.safetensors to pytorch_model.bin, as the v1 models are published."""
    import torch
    from safetensors.torch import load_file

    file = Path(directory) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def _as_in_the_hub_cache(checkpoint: Path) -> Path:
    """Moves the weights to blobs/SHA256, and returns the link that points to them."""
    [file] = [file for file in checkpoint.iterdir() if file.suffix in (".bin", ".safetensors")]
    with open(file, "rb") as opened:
        blob = checkpoint.parent / "blobs" / hashlib.file_digest(opened, "sha256").hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(Path("..") / "blobs" / blob.name)
    return file


def load_ours(directory: str) -> dict[str, float]:
    """Loads the checkpoint once in this process."""
    layout = make_layout(config.MeshConfig(data=1))
    before, start = resident_bytes(), time.perf_counter()
    loaded = load_weights(config.ModelConfig(checkpoint=directory, dtype="float32"), layout, lm_head=True)
    jax.block_until_ready(jax.tree.leaves(loaded.model))
    loaded.provenance  # noqa: B018 - waits until the file is hashed
    return _taken(start, before)


def load_transformers(directory: str) -> dict[str, float]:
    """Loads the checkpoint once in this process and reads each parameter, since safetensors only maps the file."""
    import torch
    from transformers import EsmForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    before, start = resident_bytes(), time.perf_counter()
    model = EsmForMaskedLM.from_pretrained(directory, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.detach().view(torch.int32).bitwise_and(1).any()
    return _taken(start, before)


def _taken(start: float, before: int) -> dict[str, Any]:
    seconds, peak = time.perf_counter() - start, peak_host_bytes()
    return {"seconds": seconds, "peak_gib": peak / 2**30, "grown_gib": (peak - before) / 2**30}
