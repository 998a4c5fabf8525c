import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.projections import random_projection

from bioscan_jax.checkpoints.projection_files import has_projection, read_projection, write_projection
from bioscan_jax.errors import InputError

NETWORKS = ((16, 8, None), (12, 10, 3.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, dtype):
    projection = random_projection(networks=NETWORKS, weights=(1.0, 0.5, 2.0), description="fitted on é")
    assert not has_projection(tmp_path / "p")
    rounded = write_projection(tmp_path / "p", projection, dtype=dtype)
    assert has_projection(tmp_path / "p")
    again = read_projection(tmp_path / "p")
    assert again.sha256 == rounded.sha256
    assert (again.sha256 == projection.sha256) == (dtype is np.float32)
    assert (again.inputs, again.weights, again.description) == (
        projection.inputs,
        projection.weights,
        projection.description,
    )
    assert [network.input_length for network in again.networks] == [None, 3.0]
    assert again.arrays.keys() == projection.arrays.keys()
    for name, array in again.arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, projection.arrays[name].astype(dtype).astype(np.float32))


def test_files_repeat_to_the_bit_and_leave_others_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_projection(tmp_path, random_projection(networks=NETWORKS))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_projection(tmp_path, random_projection(networks=NETWORKS))
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["model.safetensors", "projection.json", "projection.safetensors"]


def change(key, value):
    def edit(directory):
        path = directory / "projection.json"
        raw = json.loads(path.read_text())
        *outer, last = key.split(".")
        place = raw
        for name in outer:
            place = place[int(name) if name.isdigit() else name]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        path.write_text(json.dumps(raw))

    return edit


def array(name, alter):
    def edit(directory):
        path = directory / "projection.safetensors"
        arrays = load_file(path)
        values = alter(arrays.pop(name, None))
        save_file(arrays | ({} if values is None else {name: values}), path)

    return edit


def not_finite(values):
    return np.where(np.arange(values.size).reshape(values.shape) == 3, np.nan, values).astype(values.dtype)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("inputs.colour", 1), r"projection.json: unknown key inputs.colour"),
        (change("colour", 1), r"projection.json: unknown key colour"),
        (change("weights", ...), r"projection.json: no key weights"),
        (change("inputs.phases", ...), r"projection.json: no key inputs.phases"),
        (change("inputs.phases", "six"), r"projection.json: inputs.phases = 'six'"),
        (change("inputs.phases", True), r"projection.json: inputs.phases = True"),
        (change("inputs.pooling", "sum"), r"projection.json: inputs.pooling = 'sum'"),
        (change("inputs.groups", 3), r"inputs.groups = 3 is not supported"),
        (change("networks.0.input_length", "long"), r"networks.0.input_length = 'long'"),
        (change("networks.1.colour", 1), r"unknown key networks.1.colour"),
        (change("networks", [1, 2]), r"networks.0 = 1"),
        (change("weights", [1.0]), r"weights \[1.0\] need"),
        (change("weights", [0, 0, 0]), r"not all 0"),
        (change("weights", [1, "a", 0]), r"weights.1 = 'a'"),
        (change("weights", [1, 2, 3]), r"projection.safetensors: its values have sha256"),
        (change("inputs.phases", 5), r"its values have sha256"),
        (change("format", "bioscan_jax projection 9"), r"not a projection of this version"),
        (array("mean", lambda values: values[1:]), r"projection.safetensors: linear has shape \(64, 24\)"),
        (array("linear", lambda values: values[None]), r"linear has shape \(1, 64, 24\)"),
        (array("linear", lambda values: values.astype(np.float64)), r"linear is float64"),
        (array("networks.0.w1", lambda values: values[:, 1:]), r"networks.0.b1 has shape \(16,\)"),
        (array("networks.0.w2", not_finite), r"networks.0.w2 has values that are not finite"),
        (array("mean", lambda values: None), r"projection.safetensors: no array 'mean'"),
        (array("colour", lambda values: np.ones(1, np.float32)), r"unknown array 'colour'"),
        (array("mean", lambda values: values + 1), r"its values have sha256"),
        (lambda directory: (directory / "projection.json").write_text("{"), r"projection.json: not readable as JSON"),
        (lambda directory: (directory / "projection.safetensors").write_bytes(b"1"), r"not a whole safetensors file"),
        (lambda directory: (directory / "projection.safetensors").unlink(), r"projection.safetensors: not found"),
    ],
)
def test_strict_reading(tmp_path, edit, message):
    write_projection(tmp_path, random_projection(networks=NETWORKS))
    edit(tmp_path)
    with pytest.raises(InputError, match=message):
        read_projection(tmp_path)


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    projection = random_projection()
    projection.linear[3, 4] = 1e6
    with pytest.raises(InputError, match="linear has values that are not finite"):
        write_projection(tmp_path / "p", projection, dtype=np.float16)
    assert not (tmp_path / "p").exists()


def test_missing_directory(tmp_path):
    with pytest.raises(InputError, match=r"projection.json: not found"):
        read_projection(tmp_path / "absent")
