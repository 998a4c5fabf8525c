"""Writes safetensors files, a tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bioscan_jax.checkpoints.readers import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5_000_000_000
"""Of tensors in one file, as on the hub."""

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is made when its turn comes to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> "PendingTensor":
        """A tensor that is there already."""
        return cls(name, values.dtype, values.shape, lambda: values)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory: Path, tensors: Sequence[PendingTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or above `max_shard_bytes` its shards with their index; one tensor is held at a time.

    Args:
        directory: Must exist.
        tensors: Are written in this order, but for the size of their numbers: the widest first, so that all are
            aligned.
        max_shard_bytes: Largest sum of the tensors in one file, unless one tensor alone is larger.
    """
    shards: list[list[PendingTensor]] = [[]]
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Sequence[PendingTensor], facts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes one safetensors file, a tensor at a time.

    The format (github.com/huggingface/safetensors): eight bytes that say how long the header is, the header as JSON
    padded to a multiple of eight bytes, then the numbers.

    Args:
        path: The file.
        tensors: In the order they lie in it.
        facts: Go into the header's `__metadata__`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **facts}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name], begin = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read())
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name} is {values.dtype} {values.shape}, announced as {tensor.dtype} {tensor.shape}"
                )
            file.write(values.reshape(-1).view(np.uint8).data)
