"""Writes safetensors files one tensor at a time.

safetensors' own writer needs all tensors of a file in memory (a merged checkpoint is computed layer by layer while it
is written), and stores several metadata entries in random order (identify records the digest of the heads file).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bioscan_jax.checkpoints.readers import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5_000_000_000
"""Largest total size of the tensors in one file, as on the Hugging Face hub."""

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor whose values are computed when it is written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @classmethod
    def from_array(cls, name: str, values: np.ndarray) -> "PendingTensor":
        """Wraps values that are already in memory."""
        return cls(name, values.dtype, values.shape, lambda: values)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory: Path, tensors: Sequence[PendingTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards with an index above `max_shard_bytes`; holds one tensor at a time.

    Args:
        directory: Must exist.
        tensors: Written in this order after sorting by item size, largest first, so that all are aligned.
        max_shard_bytes: Largest total size of the tensors in one file, unless a single tensor is larger.
    """
    shards: list[list[PendingTensor]] = [[]]
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(
    path: Path, tensors: Sequence[PendingTensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes one safetensors file, one tensor at a time.

    The format (github.com/huggingface/safetensors): the header's length in eight bytes, the header as JSON padded to a
    multiple of eight bytes, then the tensors' values.

    Args:
        path: The file.
        tensors: Their order is the order in the file.
        metadata: Added to the header's `__metadata__`.

    Raises:
        ValueError: The values of a tensor do not have its dtype and shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
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
