"""Reads tensors from Hugging Face checkpoint files (safetensors or PyTorch), a few rows at a time.

Neither torch nor the pickle machine is used. A tensor of either format is described by its file and byte range. Files
are read rather than memory-mapped, as safetensors does, because mapped pages would count as resident memory.
"""

import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from bioscan_jax.checkpoints.pickles import read_views
from bioscan_jax.errors import InputError, one_line, shown

FORMATS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Main weights file of a checkpoint, most preferred first."""

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_DIMENSIONS = 32
_MAX_EMPTY_BYTES = 1 << 40  # of an empty tensor, its zeros counted as ones: far below where numpy's sizes overflow
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor: `offset` in bytes from the start of `file`, `strides` in elements."""

    name: str
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Returns the files that hold a checkpoint's weights: one file, or all shards named by its index.

    Raises:
        InputError: There are no weights, the index is unreadable, or one of its shards is missing.
    """
    entry = _main_file(directory)
    if entry.suffix != ".json":
        return (entry,)
    return tuple(directory / shard for shard in sorted(set(_weight_map(entry).values())))


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a checkpoint directory from the file headers only.

    Looks for the files of `FORMATS` in that order. The byte range of every tensor is checked against its file.

    Raises:
        InputError: There are no weights; a file is damaged, truncated, or not of the format of its name; an index and
            its shards disagree; or a pickle contains anything but tensors (none of it is executed).
    """
    entry = _main_file(directory)
    if entry.suffix != ".json":
        return {tensor.name: tensor for tensor in list_file(entry)}
    weight_map = _weight_map(entry)
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        for tensor in list_file(file):
            if tensor.name in found:
                raise InputError(
                    f"tensor {shown(tensor.name)} is in both {found[tensor.name].file} and {file}; download them again"
                )
            if tensor.name not in weight_map:
                raise InputError(f"{file} holds tensor {shown(tensor.name)}, which {entry} lacks; download both again")
            if weight_map[tensor.name] != file.name:
                raise InputError(
                    f"tensor {shown(tensor.name)} is in {file}, but {entry} puts it in {shown(weight_map[tensor.name])}; "
                    "download them again"
                )
            found[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"{directory / shard} lacks tensor {shown(name)} of {entry}; download both again")
    return found


def read_rows(tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
    """Reads a tensor, or a range of rows along its first dimension, in its stored dtype.

    A contiguous tensor needs only the memory it returns; one saved with other strides (a transposed view) also needs,
    while it is copied, its storage from the first to the last element.

    Args:
        tensor: One of `list_tensors`.
        rows: Start and stop as in list slicing; None for all rows. A step is not supported.

    Raises:
        InputError: The file ends early.
        ValueError: `rows` has a step, or the tensor has no dimension to slice.
    """
    shape, first = tensor.shape, 0
    if rows is not None:
        if not shape or rows.step not in (None, 1):
            raise ValueError(f"{rows} cannot slice the rows of {tensor.name} with shape {shape}")
        first, stop, _ = rows.indices(shape[0])
        shape = (max(stop - first, 0), *shape[1:])
    offset = tensor.offset + (first * tensor.strides[0] * tensor.dtype.itemsize if first else 0)
    if _is_contiguous(shape, tensor.strides):
        values = np.empty(shape, tensor.dtype)
        _read_into(values, tensor, offset)
        return values
    span = np.empty(_span(shape, tensor.strides), tensor.dtype)
    _read_into(span, tensor, offset)
    byte_strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(span, shape, byte_strides, writeable=False).copy()


def sha256_of(paths: Iterable[Path], progress: Callable[[int], None] | None = None) -> str:
    r"""Returns one digest of a checkpoint's weight files, independent of their directory.

    It is the sha256 of the lines "FILENAME SHA256\n", one per file, in order of name. A link to a blob in a Hugging
    Face cache that is named by 64 hex digits is not read: that name is the sha256 given by the hub.

    Args:
        paths: The files, as from `weight_files`.
        progress: Called with the bytes read since its last call.
    """
    lines = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        lines.update(f"{path.name} {_file_sha256(path, progress or (lambda _: None))}\n".encode())
    return lines.hexdigest()


def _file_sha256(path: Path, progress: Callable[[int], None]) -> str:
    if path.is_symlink():
        # Follows one link only: a blob may itself be a link to a file whose name is not its sha256.
        blob = Path(os.readlink(path))
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            progress(path.stat().st_size)
            return blob.name
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _main_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}; check --model.checkpoint")
    for name in FORMATS:
        if (directory / name).is_file():
            return directory / name
    there = [path.name if path.exists() else f"{path.name} (broken link)" for path in sorted(directory.iterdir())]
    listing = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    raise InputError(
        f"no weights in {directory}: looked for {', '.join(FORMATS)} and found {listing or 'nothing'}; "
        "download the checkpoint again"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not a checkpoint index with a weight_map; download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is not a table of tensors; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
            raise InputError(
                f"{index}: shard {shown(shard)} of tensor {shown(name)} is not a file beside it; download it again"
            )
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} names shard {shown(shard)}, which is missing from {index.parent}; download it")
    return weight_map


def list_file(file: Path) -> list[StoredTensor]:
    """Lists the tensors of one safetensors or PyTorch file.

    Raises:
        InputError: It is damaged, or of another format.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(32)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; check the disk and its permissions") from error
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in {file.parent}")
    return _list_safetensors(file) if file.suffix == ".safetensors" else _list_pickled(file, head)


def _list_safetensors(file: Path) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            names = set(opened.keys())
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({one_line(error)}); download it again") from error
    header.pop("__metadata__", None)
    if set(header) != names:
        raise InputError(f"{file}: its header is ambiguous; download it again")
    size = file.stat().st_size
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{file}: tensor {shown(name)} has dtype {entry['dtype']}, which is not supported; save it as F32"
            )
        shape = tuple(entry["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        tensor = StoredTensor(name, file, begin, SAFETENSORS_DTYPES[entry["dtype"]], shape, strides)
        tensors.append(_check_bounds(tensor, end, size))
    return tensors


def _list_pickled(file: Path, head: bytes) -> list[StoredTensor]:
    if not head.startswith(b"PK\x03\x04"):
        if head.startswith(b"\x80"):
            raise InputError(f"{file} is in torch's old format from before 1.6; load it in torch and save it again")
        raise InputError(f"{file} is not a torch checkpoint: it starts with {head[:8]!r}; download it again")
    try:
        with zipfile.ZipFile(file) as archive:
            folder, entries = _archive_entries(archive, file)
            views = read_views(archive.read(f"{folder}/data.pkl"), str(file))
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError, struct.error) as error:
        raise InputError(f"{file} is truncated or damaged ({type(error).__name__}); download it again") from error
    tensors = []
    size = file.stat().st_size
    with open(file, "rb") as opened:
        for name, view in views.items():
            storage = view.storage
            entry = entries.get(f"{folder}/data/{storage.key}")
            if entry is None or storage.numel * storage.dtype.itemsize > entry.file_size:
                raise InputError(f"{file}: the data of tensor {shown(name)} is missing or too short; download it again")
            opened.seek(entry.header_offset)
            local = opened.read(30)
            if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
                raise InputError(
                    f"{file}: the data of tensor {shown(name)} is not where it should be; download it again"
                )
            name_bytes, extra_bytes = struct.unpack("<HH", local[26:])
            begin = entry.header_offset + 30 + name_bytes + extra_bytes
            end = begin + storage.numel * storage.dtype.itemsize
            offset = begin + view.start * storage.dtype.itemsize
            tensor = StoredTensor(name, file, offset, storage.dtype, view.shape, view.strides)
            tensors.append(_check_bounds(tensor, end, size))
    return tensors


def _archive_entries(archive: zipfile.ZipFile, file: Path) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    folders = [name.split("/")[0] for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1 or len(entries) != len(archive.infolist()):
        raise InputError(f"{file} is a zip archive but not a torch checkpoint; download it again")
    folder = folders[0]
    if f"{folder}/constants.pkl" in entries:
        raise InputError(f"{file} is a TorchScript program, not a state dict; save model.state_dict()")
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise InputError(
                f"{file}: {shown(entry.filename)} is compressed or encrypted, as torch never saves it; save it again in torch"
            )
    if f"{folder}/byteorder" in entries and (order := archive.read(f"{folder}/byteorder")) != b"little":
        raise InputError(f"{file} has byte order {order[:8]!r}, not little; save it again on a little-endian machine")
    return folder, entries


def _check_bounds(tensor: StoredTensor, end: int, size: int) -> StoredTensor:
    """Returns the tensor; raises InputError where it needs more than its data (up to `end`) or its file (`size`)."""
    shape = tensor.shape
    item = tensor.dtype.itemsize
    if (
        len(shape) > _MAX_DIMENSIONS
        or end > size
        or tensor.offset + _span(shape, tensor.strides) * item > end
        or math.prod(max(length, 1) for length in shape) * item > (_MAX_EMPTY_BYTES if 0 in shape else size)
    ):
        raise InputError(f"{tensor.file}: tensor {shown(tensor.name)} reaches past its data; download the file again")
    return tensor


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of elements from the first to the last of a view, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def _read_into(values: np.ndarray, tensor: StoredTensor, offset: int) -> None:
    remaining = values.reshape(-1).view(np.uint8).data
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(offset)
        while remaining:
            count = file.readinto(remaining)
            if not count:
                raise InputError(
                    f"{tensor.file}: file truncated inside tensor {shown(tensor.name)}, {len(remaining)} bytes short; "
                    "download it again"
                )
            remaining = remaining[count:]
