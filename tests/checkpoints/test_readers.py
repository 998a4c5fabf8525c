import contextlib
import copyreg
import hashlib
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bioscan_jax.checkpoints.readers import list_tensors, read_rows, sha256_of, weight_files
from bioscan_jax.errors import InputError

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]


def arange(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return (np.arange(math.prod(shape)) % 100 - 20).reshape(shape).astype(dtype)


def assert_reads_back(directory: Path, expected: dict[str, np.ndarray]) -> None:
    tensors = list_tensors(directory)
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        read = read_rows(tensors[name])
        assert tensors[name].name == name
        assert read.dtype == values.dtype == tensors[name].dtype
        assert read.shape == values.shape == tensors[name].shape
        assert read.tobytes() == values.tobytes()


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as raised:
        list_tensors(directory)
    message = str(raised.value)
    assert "\n" not in message
    return message


# A torch archive by hand: torch itself is only needed to show that it writes the same thing.


def literal(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def name_of(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def storage_id(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    key: str = "0",
    kind: str = "torch.FloatStorage",
    numel: object = 6,
    start: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
    after: bytes = b"",
) -> bytes:
    storage = storage_id(literal("storage"), name_of(kind), literal(key), literal("cpu"), literal(numel))
    view = literal(start) + literal(shape) + literal(strides) + literal(False)
    hooks = name_of("collections.OrderedDict") + b")R"
    return name_of("torch._utils._rebuild_tensor_v2") + b"(" + storage + view + hooks + after + b"tR"


def state_dict(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(literal(name) + value for name, value in tensors.items()) + b"u."


SIX = arange((2, 3), np.float32)


def write_archive(file: Path, program: bytes, folder: str = "archive", **options: object) -> Path:
    entries = {"data.pkl": program, "byteorder": b"little", "data/0": SIX.tobytes(), "version": b"3\n"}
    entries.update(options.pop("entries", {}))  # type: ignore[call-overload]
    with zipfile.ZipFile(file, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in entries.items():
            archive.writestr(f"{folder}/{name}", content)
    return file


# safetensors


@pytest.mark.parametrize("dtype", [*DTYPES, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4), (0, 3), (3, 0)])
def test_safetensors_round_trip(tmp_path: Path, dtype: type, shape: tuple[int, ...]):
    expected = {"encoder.weight": arange(shape, dtype), "first": arange((3,), np.float32)}
    save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_reads_back(tmp_path, expected)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.slices(8).filter(lambda rows: rows.step in (None, 1)))
@example([0, 6, 6], slice(None))  # no bytes of its own, and more in the other dimensions than the file has
@settings(max_examples=60, deadline=None)
def test_rows_of_safetensors_are_the_rows_numpy_takes(tmp_path_factory, shape: list[int], rows: slice):
    directory = tmp_path_factory.mktemp("checkpoint")
    values = arange(tuple(shape), np.float32)
    save_file({"a": values, "b": values + 1}, directory / "model.safetensors")
    np.testing.assert_array_equal(read_rows(list_tensors(directory)["b"], rows), values[rows] + 1, strict=True)


def test_rows_that_cannot_be_sliced_are_refused(tmp_path: Path):
    save_file({"a": SIX, "scalar": np.array(1.0)}, tmp_path / "model.safetensors")
    tensors = list_tensors(tmp_path)
    with pytest.raises(ValueError, match=re.escape("slice(0, 2, 2) cannot slice the rows of a with shape (2, 3)")):
        read_rows(tensors["a"], slice(0, 2, 2))
    with pytest.raises(ValueError, match=re.escape("cannot slice the rows of scalar with shape ()")):
        read_rows(tensors["scalar"], slice(0, 1))


def test_only_the_wanted_bytes_are_read_and_held(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    values = arange((1024, 1024), np.float32)
    save_file({"a": values}, file)
    stored = list_tensors(tmp_path)["a"]
    os.truncate(file, stored.offset + 512 * 4096)
    tracemalloc.start()
    rows = read_rows(stored, slice(256, 512))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(rows, values[256:512])
    assert peak < rows.nbytes + (64 << 10)
    with pytest.raises(InputError) as raised:
        read_rows(stored, slice(500, 600))
    assert str(raised.value) == (
        f"{file}: file truncated inside tensor 'a', {88 * 4096} bytes short; download it again"
    )


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int):
    file = tmp_path / "model.safetensors"
    save_file({"a": SIX}, file)
    file.write_bytes(file.read_bytes()[:keep])
    assert re.fullmatch(rf"{file} is not a whole safetensors file \(.+\); download it again", refusal(tmp_path))


def test_safetensors_dtype_without_a_numpy_type(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert refusal(tmp_path) == f"{file}: tensor 'a' has dtype F8_E4M3, which is not supported; save it as F32"


@pytest.mark.parametrize("shape", ["[0,4611686018427387904]", f"[{','.join(['1'] * 33)}]"])
def test_safetensors_shape_numpy_could_not_hold(tmp_path: Path, shape: str):
    file = tmp_path / "model.safetensors"
    end = 0 if shape.startswith("[0") else 1
    header = f'{{"a":{{"dtype":"I8","shape":{shape},"data_offsets":[0,{end}]}}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0" * end)
    assert refusal(tmp_path) == f"{file}: tensor 'a' reaches past its data; download the file again"


# Which files


def test_preference_and_weight_files(tmp_path: Path):
    def sharded(stem: str, suffix: str) -> None:
        weight_map = {"a": f"{stem}-2.{suffix}", "b": f"{stem}-1.{suffix}", "c": f"{stem}-2.{suffix}"}
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / f"{stem}-1.{suffix}").touch()
        (tmp_path / f"{stem}-2.{suffix}").touch()

    found = []
    for add in [
        lambda: sharded("pytorch_model", "bin"),
        lambda: (tmp_path / "pytorch_model.bin").touch(),
        lambda: sharded("model", "safetensors"),
        lambda: (tmp_path / "model.safetensors").touch(),
    ]:
        add()
        found.append([path.name for path in weight_files(tmp_path)])
    assert found == [
        ["pytorch_model-1.bin", "pytorch_model-2.bin"],
        ["pytorch_model.bin"],
        ["model-1.safetensors", "model-2.safetensors"],
        ["model.safetensors"],
    ]


def test_no_weights(tmp_path: Path):
    looked_for = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == (
        f"no weights in {empty}: looked for {looked_for} and found nothing; download the checkpoint again"
    )
    (empty / "flax_model.msgpack").touch()
    (empty / "model.safetensors").symlink_to("nowhere")
    assert refusal(empty).endswith(
        "found flax_model.msgpack, model.safetensors (broken link); download the checkpoint again"
    )
    for number in range(30):
        (empty / f"x{number:02}").touch()
    assert refusal(empty).endswith("x17 and 12 more; download the checkpoint again")
    assert refusal(tmp_path / "gone") == f"no checkpoint directory {tmp_path / 'gone'}; check --model.checkpoint"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert refusal(tmp_path) == (
        f"{tmp_path / name} is a Git LFS pointer, not the weights; run `git lfs pull` in {tmp_path}"
    )


def test_unreadable_file(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.symlink_to("/proc/self/mem")
    assert refusal(tmp_path) == (f"{file} cannot be read: Input/output error; check the disk and its permissions")


# Shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": SIX, "b": SIX + 1}, tmp_path / "model-1.safetensors")
    save_file({"c": SIX + 2}, tmp_path / "model-2.safetensors")
    return tmp_path


def index(directory: Path, weight_map: object) -> Path:
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": weight_map}))
    return file


WHOLE = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}


def test_sharded_safetensors_round_trip(sharded: Path):
    index(sharded, WHOLE)
    assert_reads_back(sharded, {"a": SIX, "b": SIX + 1, "c": SIX + 2})
    assert list_tensors(sharded)["c"].file == sharded / "model-2.safetensors"


def test_index_lists_a_tensor_no_shard_has(sharded: Path):
    file = index(sharded, WHOLE | {"d": "model-2.safetensors"})
    assert refusal(sharded) == (f"{sharded / 'model-2.safetensors'} lacks tensor 'd' of {file}; download both again")


def test_shard_holds_a_tensor_the_index_lacks(sharded: Path):
    file = index(sharded, {name: shard for name, shard in WHOLE.items() if name != "b"})
    assert refusal(sharded) == (
        f"{sharded / 'model-1.safetensors'} holds tensor 'b', which {file} lacks; download both again"
    )


def test_tensor_is_in_another_shard_than_the_index_says(sharded: Path):
    file = index(sharded, WHOLE | {"b": "model-2.safetensors"})
    assert refusal(sharded) == (
        f"tensor 'b' is in {sharded / 'model-1.safetensors'}, but {file} puts it in 'model-2.safetensors'; "
        "download them again"
    )


def test_tensor_is_in_two_shards(sharded: Path):
    index(sharded, WHOLE)
    save_file({"c": SIX, "a": SIX}, sharded / "model-2.safetensors")
    assert refusal(sharded) == (
        f"tensor 'a' is in both {sharded / 'model-1.safetensors'} and {sharded / 'model-2.safetensors'}; "
        "download them again"
    )


def test_shard_is_missing(sharded: Path):
    file = index(sharded, WHOLE)
    (sharded / "model-2.safetensors").unlink()
    assert refusal(sharded) == f"{file} names shard 'model-2.safetensors', which is missing from {sharded}; download it"


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/model-1.safetensors", "..", ".", "", "a/b", 7, None])
def test_shard_outside_the_directory(sharded: Path, shard: object):
    file = index(sharded, {"a": shard})
    assert refusal(sharded) == f"{file}: shard {shard!r} of tensor 'a' is not a file beside it; download it again"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_index_is_not_one(sharded: Path, text: str):
    file = sharded / "model.safetensors.index.json"
    file.write_text(text)
    assert refusal(sharded) == f"{file} is not a checkpoint index with a weight_map; download it again"


@pytest.mark.parametrize("weight_map", [{}, [], "a", None])
def test_index_without_tensors(sharded: Path, weight_map: object):
    file = index(sharded, weight_map)
    assert refusal(sharded) == f"{file}: weight_map is not a table of tensors; download it again"


# Torch archives


def test_archive_by_hand_reads_back(tmp_path: Path):
    transposed = tensor(shape=(3, 2), strides=(1, 3))
    column = tensor(start=1, shape=(2,), strides=(3,))
    parameter = name_of("torch._utils._rebuild_parameter") + tensor() + literal(True) + literal(None) + b"\x87R"
    write_archive(tmp_path / "pytorch_model.bin", state_dict(a=tensor(), t=transposed, c=column, p=parameter))
    assert_reads_back(tmp_path, {"a": SIX, "t": SIX.T, "c": SIX[:, 1], "p": SIX})


@given(st.permutations([0, 1, 2]), st.tuples(*[st.slices(5)] * 3), st.slices(5))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_strided_views_read_like_numpy(tmp_path_factory, axes: list[int], cuts: tuple[slice, ...], rows: slice):
    base = arange((3, 4, 5), np.int16)
    cuts = tuple(slice(cut.start, cut.stop, abs(cut.step or 1)) for cut in cuts)
    view = base[cuts].transpose(axes)
    start = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 2 if view.size else 0
    program = tensor(
        kind="torch.ShortStorage",
        numel=base.size,
        start=start,
        shape=view.shape,
        strides=tuple(stride // 2 for stride in view.strides),
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    write_archive(
        directory / "pytorch_model.bin",
        state_dict(a=tensor(numel=0, shape=(0,), strides=(1,)), v=program),
        entries={"data/0": base.tobytes()},
    )
    stored = list_tensors(directory)["v"]
    rows = slice(rows.start, rows.stop)
    np.testing.assert_array_equal(read_rows(stored), view, strict=True)
    np.testing.assert_array_equal(read_rows(stored, rows), view[rows], strict=True)


def test_a_strided_read_stays_within_its_stretch(tmp_path: Path):
    base = arange((512, 512), np.float32)
    file = write_archive(
        tmp_path / "pytorch_model.bin",
        state_dict(a=tensor(numel=base.size, start=512 * 8, shape=(512, 4), strides=(1, 512))),
        entries={"data/0": base.tobytes()},
    )
    stored = list_tensors(tmp_path)["a"]
    os.truncate(file, stored.offset + 4 * 512 * 4)
    tracemalloc.start()
    values = read_rows(stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(values, base[8:12].T)
    assert peak < 2 * values.nbytes + (64 << 10)


PAST_ITS_DATA = "{file}: tensor 'a' reaches past its data; download the file again"
SHORT = "{file}: the data of tensor 'a' is missing or too short; download it again"
NOT_A_TENSOR = (
    "{file}: its pickle uses REDUCE of torch._utils._rebuild_tensor_v2 as no saved state dict does; "
    "none of it was executed; use the model's safetensors file"
)
NOT_A_STORAGE = NOT_A_TENSOR.replace("REDUCE of torch._utils._rebuild_tensor_v2", "a persistent id")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor(start=1), PAST_ITS_DATA),
        (tensor(shape=(2, 4)), PAST_ITS_DATA),
        (tensor(strides=(4, 1)), PAST_ITS_DATA),
        (tensor(shape=(2**40, 3), strides=(0, 1)), PAST_ITS_DATA),
        (tensor(shape=(2**62, 2**62), strides=(2**62, 2**62)), PAST_ITS_DATA),
        (tensor(shape=(0, 2**62), strides=(1, 1)), PAST_ITS_DATA),
        (tensor(shape=(0,), strides=(1,), start=7), PAST_ITS_DATA),
        (tensor(shape=(1,) * 33, strides=(1,) * 33), PAST_ITS_DATA),
        (tensor(numel=7), SHORT),
        (tensor(kind="torch.DoubleStorage"), SHORT),
        (tensor(numel=2**62), SHORT),
        (tensor(key="1"), SHORT),
        (tensor(key="../data.pkl"), SHORT),
        (tensor(shape=(2, -3)), NOT_A_TENSOR),
        (tensor(strides=(-3, 1)), NOT_A_TENSOR),
        (tensor(start=-1), NOT_A_TENSOR),
        (tensor(start=True), NOT_A_TENSOR),
        (tensor(shape=(2, 3.0)), NOT_A_TENSOR),
        (tensor(shape=[2, 3]), NOT_A_TENSOR),
        (tensor(shape=(2, 3), strides=(1,)), NOT_A_TENSOR),
        (tensor(after=literal({"conj": True})), NOT_A_TENSOR),
        (tensor(numel=-6), NOT_A_STORAGE),
        (tensor(numel=6.0), NOT_A_STORAGE),
        (tensor(numel=True), NOT_A_STORAGE),
        (tensor(kind="collections.OrderedDict"), NOT_A_STORAGE),
        (literal("storage") + b"Q", NOT_A_STORAGE),
        (literal(7) + b"Q", NOT_A_STORAGE),
        (literal(None) + b"Q", NOT_A_STORAGE),
        (storage_id(), NOT_A_STORAGE),
        (
            storage_id(literal("module"), name_of("torch.FloatStorage"), literal("0"), literal("cpu"), literal(6)),
            NOT_A_STORAGE,
        ),
        (
            storage_id(literal("storage"), literal("FloatStorage"), literal("0"), literal("cpu"), literal(6)),
            NOT_A_STORAGE,
        ),
        (
            storage_id(literal("storage"), name_of("torch.FloatStorage"), literal(0), literal("cpu"), literal(6)),
            NOT_A_STORAGE,
        ),
        (b"P0\n", NOT_A_STORAGE.replace("a persistent id", "PERSID")),
        (tensor() + literal(()) + b"R", NOT_A_STORAGE.replace("a persistent id", "REDUCE of a tensor")),
        (
            name_of("torch._utils._rebuild_parameter") + literal((1, True, None)) + b"R",
            NOT_A_STORAGE.replace("a persistent id", "REDUCE of torch._utils._rebuild_parameter"),
        ),
        (
            name_of("collections.OrderedDict") + literal(([("a", 1)],)) + b"R",
            NOT_A_STORAGE.replace("a persistent id", "REDUCE of collections.OrderedDict"),
        ),
        (tensor() + literal({}) + b"b", NOT_A_STORAGE.replace("a persistent id", "BUILD")),
        (literal(()) + b"Na", NOT_A_STORAGE.replace("a persistent id", "APPEND")),
        (tensor() + literal("k") + b"Ns", NOT_A_STORAGE.replace("a persistent id", "SETITEMS")),
        (b"}" + literal(()) + b"Ns", NOT_A_STORAGE.replace("a persistent id", "a key of type tuple")),
        (
            b"}" + (literal("k") + b"Ns") * 2,
            "{file}: 'k' is in its pickle twice; use the model's safetensors file",
        ),
    ],
)
def test_tensor_that_is_not_one(tmp_path: Path, program: bytes, message: str):
    file = write_archive(tmp_path / "pytorch_model.bin", state_dict(a=program))
    assert refusal(tmp_path) == message.format(file=file)


def test_a_tensor_named_twice(tmp_path: Path):
    program = b"\x80\x02}(" + (literal("a") + tensor()) * 2 + b"u."
    file = write_archive(tmp_path / "pytorch_model.bin", program)
    assert refusal(tmp_path) == f"{file}: 'a' is in its pickle twice; use the model's safetensors file"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02" + tensor() + b".", "{file} holds a tensor, not a dict of tensors; save model.state_dict()"),
        (b"\x80\x02](" + tensor() + b"e.", "{file} holds a list, not a dict of tensors; save model.state_dict()"),
        (b"\x80\x02}.", "{file} holds no tensors; save model.state_dict() of a whole model"),
        (
            state_dict(state_dict=b"}(" + literal("a") + tensor() + b"u", epoch=literal(3)),
            "{file}: 'state_dict' holds a dict, not a tensor; save the state dict alone, "
            "not a training checkpoint around it",
        ),
        (
            state_dict(a=tensor(), epoch=literal(3)),
            "{file}: 'epoch' holds a int, not a tensor; save the state dict alone, not a training checkpoint around it",
        ),
        (
            b"\x80\x02}K\x01" + tensor() + b"s.",
            "{file}: 1 is a number, not the name of a tensor; save model.state_dict()",
        ),
    ],
)
def test_pickle_that_is_not_one_flat_state_dict(tmp_path: Path, program: bytes, message: str):
    file = write_archive(tmp_path / "pytorch_model.bin", program)
    assert refusal(tmp_path) == message.format(file=file)


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (b"", "ValueError"),
        (state_dict(a=tensor())[:-1], "ValueError"),
        (state_dict(a=tensor())[:40], "ValueError"),
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02t.", "IndexError"),
        (b"\x80\x02\x86.", "IndexError"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b"\x80\x02\xff.", "ValueError"),
        (b"\x80\x02}(" + literal("a") + b"u.", "ValueError"),
        (b"\x80\x04K\x01K\x02\x93.", "TypeError"),
        (b"\x80\x02cos\n\xff\n.", "UnicodeDecodeError"),
    ],
)
def test_damaged_pickle(tmp_path: Path, program: bytes, kind: str):
    file = write_archive(tmp_path / "pytorch_model.bin", program)
    assert refusal(tmp_path) == f"{file}: its pickle is damaged ({kind}); download the file again"


def test_memo_far_away_costs_no_memory(tmp_path: Path):
    program = b"\x80\x02}r\xff\xff\xff\x7f(" + literal("a") + tensor() + b"u."
    write_archive(tmp_path / "pytorch_model.bin", program)
    tracemalloc.start()
    assert_reads_back(tmp_path, {"a": SIX})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


class Payload:
    """Pickles to a call of `function`, nested inside an honest-looking dict."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """Programs that run `command` in pickle.Unpickler, and what of them is refused."""
    text, system = literal(command), name_of("os.system")
    asked = "imports {!r}, which plain tensors do not need"
    used = "uses {} as no saved state dict does"
    run = f"__import__('os').system({command!r})"
    ordered = name_of("collections.OrderedDict") + b")R"
    return {
        "REDUCE": (b"\x80\x02" + system + text + b"\x85R.", asked.format("os.system")),
        "eval": (b"\x80\x02" + name_of("builtins.eval") + literal(run) + b"\x85R.", asked.format("builtins.eval")),
        "__reduce__": (
            pickle.dumps({"a": [1, {"b": Payload(os.system, command)}]}, protocol=2),
            asked.format("posix.system"),
        ),
        "protocol 4": (pickle.dumps([Payload(eval, run)], protocol=4), asked.format("builtins.eval")),
        "STACK_GLOBAL dotted": (
            b"\x80\x04" + literal("shutil") + literal("os.system") + b"\x93" + text + b"\x85R.",
            asked.format("shutil.os.system"),
        ),
        "INST": (b"(" + text + b"ios\nsystem\n.", asked.format("os.system")),
        "OBJ": (b"(" + system + text + b"o.", asked.format("os.system")),
        "EXT1": (b"\x80\x02\x82\xf0" + text + b"\x85R.", used.format("EXT1")),
        "BUILD __setstate__": (
            b"\x80\x02" + ordered + b"}" + literal("__setstate__") + system + b"sb" + text + b"b.",
            asked.format("os.system"),
        ),
        "BUILD attribute": (
            b"\x80\x02" + ordered + b"N}" + literal("append") + system + b"s\x86b" + text + b"a.",
            asked.format("os.system"),
        ),
        "inside a tensor": (
            state_dict(a=tensor(after=system + text + b"\x85R")),
            asked.format("os.system"),
        ),
    }


class Trusting(pickle.Unpickler):
    def find_class(self, module, name):
        return (lambda *parts: parts) if module.startswith("torch") else super().find_class(module, name)

    def persistent_load(self, pid):
        return pid


@pytest.fixture
def extension_registry():
    # As if a library had registered it: EXT1 then reaches the function.
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg.clear_extension_cache()


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("attack", attacks(""))
def test_an_attack_that_works_on_pickle_runs_nothing_here(tmp_path: Path, attack: str):
    sentinel = tmp_path / "sentinel"
    program, refused = attacks(f"touch {sentinel}")[attack]
    Trusting(BytesIO(program)).load()
    assert sentinel.exists(), "the attack must be a real one"
    sentinel.unlink()
    file = write_archive(tmp_path / "pytorch_model.bin", program)
    assert refusal(tmp_path) == (
        f"{file}: its pickle {refused}; none of it was executed; use the model's safetensors file"
    )
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.hub.load",
        "torch.serialization.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_wrapper_subclass",
        "torch._tensor._rebuild_from_type_v2",
        "torch.jit.load",
        "torch.storage.UntypedStorage",
        "torch.ComplexFloatStorage",
        "numpy.core.multiarray._reconstruct",
        "builtins.getattr",
        "collections.OrderedDict.__init__",
        "collections.namedtuple",
    ],
)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL"])
def test_names_that_tensors_do_not_need(tmp_path: Path, name: str, how: str):
    module, _, attribute = name.rpartition(".")
    program = name_of(name) if how == "GLOBAL" else literal(module) + literal(attribute) + b"\x93"
    file = write_archive(tmp_path / "pytorch_model.bin", b"\x80\x04" + program + b")R.")
    assert refusal(tmp_path) == (
        f"{file}: its pickle imports {name!r}, which plain tensors do not need; none of it was executed; "
        "use the model's safetensors file"
    )


def test_an_allowed_name_in_an_instruction_torch_does_not_write(tmp_path: Path):
    for program, opcode in [
        (b"(icollections\nOrderedDict\n.", "INST"),
        (b"(" + name_of("collections.OrderedDict") + b"o.", "OBJ"),
        (b"\x80\x02" + name_of("collections.OrderedDict") + b")\x81.", "NEWOBJ"),
        (b"\x80\x04" + name_of("collections.OrderedDict") + b")}\x92.", "NEWOBJ_EX"),
    ]:
        file = write_archive(tmp_path / "pytorch_model.bin", program)
        assert refusal(tmp_path) == (
            f"{file}: its pickle uses {opcode} as no saved state dict does; none of it was executed; "
            "use the model's safetensors file"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{file} is not a torch checkpoint: it starts with b''; download it again"),
        (b"<!DOCTYPE html>", "{file} is not a torch checkpoint: it starts with b'<!DOCTYP'; download it again"),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
            "{file} is in torch's old format from before 1.6; load it in torch and save it again",
        ),
        (b"PK\x03\x04" + b"\0" * 100, "{file} is truncated or damaged (BadZipFile); download it again"),
    ],
)
def test_file_that_is_not_an_archive(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert refusal(tmp_path) == message.format(file=file)


def test_archive_that_is_not_a_state_dict(tmp_path: Path):
    file = tmp_path / "pytorch_model.bin"
    honest = state_dict(a=tensor())
    not_one = f"{file} is a zip archive but not a torch checkpoint; download it again"
    write_archive(file, honest, folder="two/deep")
    assert refusal(tmp_path) == not_one
    write_archive(file, honest)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data.pkl", honest)
    assert refusal(tmp_path) == not_one
    write_archive(file, honest)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(24))
    assert refusal(tmp_path) == not_one
    write_archive(file, honest, entries={"constants.pkl": b"\x80\x02)."})
    assert refusal(tmp_path) == f"{file} is a TorchScript program, not a state dict; save model.state_dict()"
    write_archive(file, honest, compression=zipfile.ZIP_DEFLATED)
    assert refusal(tmp_path) == (
        f"{file}: 'archive/data.pkl' is compressed or encrypted, as torch never saves it; save it again in torch"
    )
    write_archive(file, honest, entries={"byteorder": b"big"})
    assert refusal(tmp_path) == (f"{file} has byte order b'big', not little; save it again on a little-endian machine")


def test_entry_whose_local_header_is_not_there(tmp_path: Path):
    file = write_archive(tmp_path / "pytorch_model.bin", state_dict(a=tensor()))
    with zipfile.ZipFile(file) as archive:
        at = archive.getinfo("archive/data/0").header_offset
    content = bytearray(file.read_bytes())
    content[at] = 0
    file.write_bytes(content)
    assert refusal(tmp_path) == f"{file}: the data of tensor 'a' is not where it should be; download it again"


def test_entry_that_claims_more_than_the_file_has(tmp_path: Path):
    program = tensor(numel=1 << 20, start=1 << 19)
    file = write_archive(tmp_path / "pytorch_model.bin", state_dict(a=program))
    content = bytearray(file.read_bytes())
    directory_entry = content.rindex(b"archive/data/0") - 46
    content[directory_entry + 20 : directory_entry + 28] = struct.pack("<II", 4 << 20, 4 << 20)
    file.write_bytes(content)
    assert refusal(tmp_path) == PAST_ITS_DATA.format(file=file)


def test_truncated_archive(tmp_path: Path):
    file = write_archive(tmp_path / "pytorch_model.bin", state_dict(a=tensor()))
    content = file.read_bytes()
    for keep in (4, 30, 100, len(content) // 2, len(content) - 22, len(content) - 1):
        file.write_bytes(content[:keep])
        assert refusal(tmp_path) == f"{file} is truncated or damaged (BadZipFile); download it again"


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_damage_is_a_clear_error_or_harmless(tmp_path_factory, data: st.DataObject):
    directory = tmp_path_factory.mktemp("checkpoint", numbered=True)
    file = directory / data.draw(st.sampled_from(["model.safetensors", "pytorch_model.bin"]))
    if file.suffix == ".bin":
        write_archive(file, state_dict(a=tensor(), b=tensor(shape=(3, 2), strides=(1, 3))))
    else:
        save_file({"a": SIX, "b": arange((3,), ml_dtypes.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with contextlib.suppress(InputError):
        for stored in list_tensors(directory).values():
            assert read_rows(stored).shape == stored.shape


# Digests


def test_sha256_is_over_name_and_digest_lines(tmp_path: Path):
    contents = {"model-2.safetensors": b"b" * (3 << 20), "model-1.safetensors": b"a"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    done: list[int] = []
    lines = "".join(f"{name} {hashlib.sha256(contents[name]).hexdigest()}\n" for name in sorted(contents))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert sha256_of([tmp_path / name for name in contents], progress=done.append) == expected
    assert sum(done) == (3 << 20) + 1
    assert len(done) > 2
    (tmp_path / "model-1.safetensors").rename(tmp_path / "model-3.safetensors")
    assert sha256_of(sorted(tmp_path.iterdir())) != expected


def test_sha256_of_a_hub_cache_file_is_its_blob_name(tmp_path: Path):
    content = b"weights"
    sha = hashlib.sha256(content).hexdigest()
    blobs, snapshot, plain = tmp_path / "blobs", tmp_path / "snapshots" / "0", tmp_path / "plain"
    for directory in (blobs, snapshot, plain):
        directory.mkdir(parents=True)
    (plain / "model.safetensors").write_bytes(content)
    (blobs / sha).write_bytes(content)
    link = snapshot / "model.safetensors"
    link.symlink_to(f"../../blobs/{sha}")
    done: list[int] = []
    assert sha256_of([link], done.append) == sha256_of([plain / "model.safetensors"])
    assert done == [len(content)]
    (blobs / sha).write_bytes(b"changed")
    assert sha256_of([link]) == sha256_of([plain / "model.safetensors"]), "the blob is not read"


def test_sha256_reads_a_link_whose_target_is_not_a_hub_blob(tmp_path: Path):
    content = b"weights"
    store, blobs = tmp_path / "blobs" / "ab", tmp_path / "repo" / "blobs"
    store.mkdir(parents=True)
    blobs.mkdir(parents=True)
    (store / ("ab" * 32)).write_bytes(content)
    (blobs / ("1" * 40)).symlink_to(store / ("ab" * 32))
    link = tmp_path / "model.safetensors"
    line = f"model.safetensors {hashlib.sha256(content).hexdigest()}\n"
    for target in (blobs / ("1" * 40), store / ("ab" * 32)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert sha256_of([link]) == hashlib.sha256(line.encode()).hexdigest()


# What torch itself writes


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_torch_dtypes_round_trip(tmp_path: Path, dtype: type, protocol: int):
    import torch

    expected = {
        "matrix": arange((4, 3), dtype),
        "scalar": arange((1,), dtype).reshape(()),
        "empty": arange((0, 3), dtype),
    }
    tensors = {
        name: torch.tensor(values.astype(np.float64)).to(getattr(torch, str(np.dtype(dtype))))
        for name, values in expected.items()
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    assert_reads_back(tmp_path, expected)


@pytest.mark.parity
def test_torch_state_dict_with_views_and_ties_round_trip(tmp_path: Path):
    import torch

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(3, 4)
            self.decoder = torch.nn.Linear(3, 4)
            self.decoder.weight = self.encoder.weight
            self.register_buffer("position_ids", torch.arange(5).expand((1, -1)))

    base = torch.arange(120.0).reshape(10, 12)
    saved = Tied().state_dict()
    saved["transposed"] = base.t()
    saved["rows"] = base[2:5]
    saved["columns"] = base[:, 3:7]
    saved["stepped"] = base[::3, ::2].t()
    saved["repeated"] = torch.ones(1).expand(4, 5)
    saved["parameter"] = torch.nn.Parameter(base[:2])
    torch.save(saved, tmp_path / "pytorch_model.bin")
    assert_reads_back(tmp_path, {name: value.detach().numpy() for name, value in saved.items()})
    tensors = list_tensors(tmp_path)
    assert tensors["encoder.weight"].offset == tensors["decoder.weight"].offset
    assert tensors["transposed"].strides == (1, 12)
    np.testing.assert_array_equal(read_rows(tensors["transposed"], slice(3, 5)), base.t()[3:5].numpy())


@pytest.mark.parity
def test_torch_shards_round_trip(tmp_path: Path):
    import torch

    expected = {name: arange((3, 2), np.float32) + number for number, name in enumerate("abcd")}
    weight_map = {}
    for number, names in enumerate(["ab", "cd"], start=1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: torch.from_numpy(expected[name]) for name in names}, tmp_path / shard)
        weight_map.update(dict.fromkeys(names, shard))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads_back(tmp_path, expected)


@pytest.mark.parity
def test_torch_files_that_are_not_plain_state_dicts(tmp_path: Path):
    import torch

    file = tmp_path / "pytorch_model.bin"
    weight = torch.ones(2, dtype=torch.complex64)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    asked = "{file}: its pickle imports {name!r}, which plain tensors do not need; none of it was executed; "
    for content, message in [
        ({"epoch": 1, "model": layer.state_dict(), "optimizer": optimizer.state_dict()}, "'epoch' holds a int"),
        ({"state_dict": layer.state_dict(), "lr": [0.1]}, "'state_dict' holds a dict"),
        (layer, asked.format(file=file, name="torch.nn.modules.linear.Linear")),
        ({"w": weight}, asked.format(file=file, name="torch.ComplexFloatStorage")),
        ({"w": torch.ones(2, 2).to_sparse()}, asked.format(file=file, name="torch._utils._rebuild_sparse_tensor")),
        ({"w": torch.ones(2, dtype=torch.uint16)}, asked.format(file=file, name="torch._utils._rebuild_tensor_v3")),
        ({"w": weight.conj().imag}, "uses REDUCE of torch._utils._rebuild_tensor_v2 as no"),
    ]:
        torch.save(content, file)
        assert message in refusal(tmp_path)
    torch.save(layer.state_dict(), file, _use_new_zipfile_serialization=False)
    assert refusal(tmp_path) == f"{file} is in torch's old format from before 1.6; load it in torch and save it again"


@pytest.mark.parity
def test_torch_archive_truncated_anywhere(tmp_path: Path):
    import torch

    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100)}, file)
    content = file.read_bytes()
    for keep in range(4, len(content), 97):
        file.write_bytes(content[:keep])
        assert refusal(tmp_path) == f"{file} is truncated or damaged (BadZipFile); download it again"
