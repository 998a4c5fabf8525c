"""Projections as files: arrays in safetensors, settings in JSON, beside a model's weights or in their own directory."""

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import numpy as np
from jax.typing import DTypeLike

from bioscan_jax.checkpoints.readers import list_file, read_rows
from bioscan_jax.checkpoints.writers import PendingTensor, write_safetensors
from bioscan_jax.errors import InputError
from bioscan_jax.model.projection import Projection, ProjectionInputs, ResidualNetwork
from bioscan_jax.output import whole_file

SETTINGS_FILE = "projection.json"
ARRAYS_FILE = "projection.safetensors"
FORMAT = "bioscan_jax projection 1"
_NETWORK_SHAPES = {
    "w1": ("mid", "hidden"),
    "b1": ("hidden",),
    "w2": ("hidden", "out"),
    "b2": ("out",),
    "skip": ("mid", "out"),
}
_OPTIONAL = ("linear", "b2", "skip")


def has_projection(directory: Path) -> bool:
    """Returns whether a directory holds a projection."""
    return (directory / SETTINGS_FILE).is_file()


def write_projection(
    directory: str | os.PathLike[str], projection: Projection, *, dtype: DTypeLike = np.float32
) -> Projection:
    """Writes `projection.safetensors` and, last, `projection.json`.

    Args:
        directory: Made if it does not exist; other files in it are left alone.
        projection: What to write.
        dtype: Of the stored arrays: float32, or float16 or bfloat16 for half the size.

    Returns:
        The projection as it will be read: its arrays are rounded to `dtype`, which changes its sha256.

    Raises:
        InputError: A value is not finite in `dtype`, shapes do not fit each other, or the disk is full.
    """
    with np.errstate(over="ignore"):
        stored = {name: np.asarray(array).astype(np.dtype(dtype)) for name, array in projection.arrays.items()}
    directory = Path(os.path.expanduser(directory))
    path = directory / ARRAYS_FILE
    input_lengths = [network.input_length for network in projection.networks]
    read = _assemble(
        path, stored, input_lengths, projection.weights, projection.inputs, projection.description
    )  # raises before anything is written
    settings = {
        "format": FORMAT,
        "description": projection.description,
        "weights": list(projection.weights),
        "networks": [{"input_length": length} for length in input_lengths],
        "inputs": dataclasses.asdict(projection.inputs),
        "sha256": read.sha256,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            write_safetensors(partial, [PendingTensor.from_array(name, stored[name]) for name in sorted(stored)])
        with whole_file(directory / SETTINGS_FILE) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    return read


def read_projection(directory: str | os.PathLike[str]) -> Projection:
    """Reads the files of `write_projection`; the arrays become float32.

    Raises:
        InputError: A file is missing or damaged, a key is unknown or missing, an array has the wrong shape or a value
            that is not finite, or the two files are of different projections.
    """
    directory = Path(os.path.expanduser(directory))
    path, arrays_path = directory / SETTINGS_FILE, directory / ARRAYS_FILE
    for file in (path, arrays_path):
        if not file.is_file():
            raise InputError(f"{file}: not found; a projection is {SETTINGS_FILE} and {ARRAYS_FILE}")
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); copy it again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{path}: not a projection of this version ({FORMAT!r}); fit it again")
    _check_keys(path, "", raw, {"format", "description", "weights", "networks", "inputs", "sha256"})
    _check_types(path, "", raw, {"description": str, "sha256": str, "weights": list, "networks": list, "inputs": dict})
    hints = typing.get_type_hints(ProjectionInputs)
    _check_keys(path, "inputs.", raw["inputs"], hints.keys())
    _check_types(path, "inputs.", raw["inputs"], hints)
    for number, network in enumerate(raw["networks"]):
        _check_types(path, f"networks.{number}", {"": network}, {"": dict})
        _check_keys(path, f"networks.{number}.", network, {"input_length"})
        _check_types(path, f"networks.{number}.", network, {"input_length": float | None})
    _check_types(path, "weights.", dict(enumerate(raw["weights"])), dict.fromkeys(range(len(raw["weights"])), float))
    inputs = ProjectionInputs(**raw["inputs"])
    if inputs.groups != 1:
        raise InputError(f"{path}: inputs.groups = {inputs.groups} is not supported, only 1; update bioscan_jax")
    stored = {tensor.name: read_rows(tensor) for tensor in list_file(arrays_path)}
    lengths = [network["input_length"] for network in raw["networks"]]
    found = _assemble(arrays_path, stored, lengths, tuple(map(float, raw["weights"])), inputs, raw["description"])
    if found.sha256 != raw["sha256"]:
        raise InputError(
            f"{arrays_path}: its values have sha256 {found.sha256[:12]}, {path.name} needs sha256 {raw['sha256'][:12]}; "
            "copy both files from the same place"
        )
    return found


def _assemble(
    path: Path,
    stored: dict[str, np.ndarray],
    input_lengths: list[float | None],
    weights: tuple[float, ...],
    inputs: ProjectionInputs,
    description: str,
) -> Projection:
    """Makes a projection of named arrays.

    Raises:
        InputError: A name is unknown or missing, a shape does not fit, or a value is not finite.
    """
    where = str(path)
    shapes = {"mean": ("features",), "linear": ("features", "mid")}
    if "linear" not in stored:
        shapes["mean"] = ("mid",)
    for number in range(len(input_lengths)):
        shapes |= {
            f"networks.{number}.{name}": tuple(side if side == "mid" else f"{number}.{side}" for side in sides)
            for name, sides in _NETWORK_SHAPES.items()
        }
    optional = {name for name in shapes if name.rsplit(".", 1)[-1] in _OPTIONAL}
    for name in sorted(stored.keys() - shapes.keys()):
        raise InputError(f"{where}: unknown array {name!r}; fit the projection again")
    for name in sorted(shapes.keys() - stored.keys() - optional):
        raise InputError(f"{where}: no array {name!r}; fit the projection again")
    sizes: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, sides in shapes.items():
        if name not in stored:
            continue
        array = stored[name]
        if np.dtype(array.dtype).name not in ("float32", "float16", "bfloat16"):
            raise InputError(f"{where}: {name} is {array.dtype}, not float32, float16 or bfloat16; save it again")
        expected = [sizes.setdefault(side, size) for side, size in zip(sides, array.shape, strict=False)]
        if array.shape != tuple(expected) or array.ndim != len(sides) or not array.size:
            raise InputError(
                f"{where}: {name} has shape {array.shape}, which does not fit [{', '.join(sides)}] = "
                f"{[sizes.get(side) for side in sides]}; fit the projection again"
            )
        arrays[name] = array.astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{where}: {name} has values that are not finite; store it as float32, or fit it again")
    if len(weights) != 1 + len(input_lengths) or not any(weights) or not all(math.isfinite(w) for w in weights):
        raise InputError(
            f"{where}: weights {list(weights)} need one finite number for the linear part and one per network "
            f"({len(input_lengths)}), not all 0; fit the projection again"
        )
    networks = tuple(
        ResidualNetwork(
            **{name: arrays[key] for name in _NETWORK_SHAPES if (key := f"networks.{number}.{name}") in arrays},
            input_length=length,
        )
        for number, length in enumerate(input_lengths)
    )
    return Projection(
        mean=arrays["mean"],
        linear=arrays.get("linear"),
        networks=networks,
        weights=weights,
        inputs=inputs,
        description=description,
    )


def _check_keys(path: Path, prefix: str, found: dict[str, Any], known: typing.Iterable[str]) -> None:
    for key in sorted(found.keys() - set(known)):
        raise InputError(f"{path}: unknown key {prefix}{key}; fit the projection again, or update bioscan_jax")
    for key in sorted(set(known) - found.keys()):
        raise InputError(f"{path}: no key {prefix}{key}; fit the projection again")


def _check_types(path: Path, prefix: str, found: dict[Any, Any], wanted: typing.Mapping[Any, Any]) -> None:
    for key, kind in wanted.items():
        if not _is_of(found[key], kind):
            raise InputError(f"{path}: {prefix}{key} = {found[key]!r} is not valid there; fit the projection again")


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
