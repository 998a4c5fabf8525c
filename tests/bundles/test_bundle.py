import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import fsspec
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.killed import run_killed
from support.tables import make_table, read, same_bits

from bioscan_jax import location
from bioscan_jax.bundles.bundle import bundle as export_bundle
from bioscan_jax.bundles.bundle import parse_bytes
from bioscan_jax.bundles.manifest import JOURNAL, MANIFEST, BundleCheck, Manifest, check_path, verify_bundle
from bioscan_jax.bundles.merge import import_bundle
from bioscan_jax.errors import InputError
from bioscan_jax.table.lock import machine_lock, place_lock, writer_lock
from bioscan_jax.table.query import query
from bioscan_jax.table.reading import check_condition

PARTS = 20_000
"""Bytes of a part: a handful of parts of our small tables."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("made")
    make_table(directory, index="ivf_sq")
    return str(directory)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A bundle in its own precision."""
    target = tmp_path_factory.mktemp("bundles") / "whole"
    export_bundle(made, str(target), part_bytes=PARTS, progress=False)
    return target


@pytest.fixture
def bundle(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def carry(source: str, target: Path, **given) -> str:
    return str(export_bundle(source, str(target), part_bytes=PARTS, progress=False, **given))


def refused(match: str, call, *arguments, **given) -> None:
    with pytest.raises(InputError, match=match) as error:
        call(*arguments, **given)
    assert "\n" not in str(error.value)


def test_a_round_trip_is_bit_identical(made, whole, tmp_path):
    assert len(list((whole / "vectors").iterdir())) > 2
    assert verify_bundle(str(whole)) == BundleCheck(len(contents(whole)) - 1, ())
    done = import_bundle(str(whole), str(tmp_path / "db"))
    assert (done.inserted, done.existing, done.rejects) == (429, 0, 71)
    assert done.indexes == ("sequence_id: BTREE", "vector: IVF_SQ")
    for name in ("sequences", "sequences_rejects"):
        assert same_bits(read(tmp_path / "db", name), read(made, name))
    assert (tmp_path / "db" / "sequences.run.json").read_text() == '{"speed": 1}'
    again = import_bundle(str(whole), str(tmp_path / "db"))
    assert (again.inserted, again.existing, again.rejects) == (0, 429, 0)
    for name in ("sequences", "sequences_rejects"):
        assert same_bits(read(tmp_path / "db", name), read(made, name))


def test_a_bundle_is_plain_parquet_without_links(whole, made):
    parts = sorted((whole / "vectors").iterdir())
    found = pa.concat_tables(pq.read_table(part) for part in parts)
    assert found.to_pylist() == read(made).to_pylist()
    assert all(path.stat().st_nlink == 1 for path in whole.rglob("*") if path.is_file())
    for name in contents(whole):
        check_path(name, "the bundle")


def test_values_of_every_column_type_are_read_back(tmp_path):
    rows = 8
    struct = pa.struct([("at", pa.timestamp("s", "UTC")), ("tags", pa.list_(pa.large_string()))])
    columns = {
        "sequence_id": pa.array([f"é'{i}\\" for i in range(rows)]),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(np.array([np.nan, -0.0, 1e-45, -np.inf] * rows, np.float32)), 4
        ),
        "second": pa.array(range(rows), pa.timestamp("s")),
        "nano": pa.array(range(rows), pa.timestamp("ns", "Europe/Berlin")),
        "took": pa.array(range(rows), pa.duration("s")),
        "day": pa.array(range(rows), pa.int32()).cast(pa.date32()),
        "hour": pa.array(range(rows), pa.time32("s")),
        "money": pa.array(range(rows), pa.int64()).cast(pa.decimal128(25, 3)),
        "small": pa.array(range(rows), pa.uint8()),
        "half": pa.array(np.arange(rows, dtype=np.float16)),
        "raw": pa.array([b"\x00\xff"] * rows, pa.binary(2)),
        "text": pa.array(["x", None] * 4, pa.large_string()),
        "flag": pa.array([True, None] * 4),
        "nested": pa.array([{"at": i, "tags": [None, "a"]} for i in range(rows)], struct),
        "pairs": pa.FixedSizeListArray.from_arrays(pa.array(range(2 * rows), pa.int16()), 2),
    }
    lance.write_dataset(
        pa.table(columns).replace_schema_metadata({"weights_sha256": "w"}), str(tmp_path / "db/t.lance")
    )
    export_bundle(str(tmp_path / "db"), str(tmp_path / "bundle"), "t", progress=False)
    for _ in range(2):
        import_bundle(str(tmp_path / "bundle"), str(tmp_path / "new"))
        assert same_bits(read(tmp_path / "new", "t"), read(tmp_path / "db", "t"))


def test_damaged_missing_and_extra_files_are_reported(bundle, tmp_path):
    first, second = sorted((bundle / "vectors").iterdir())[:2]
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.unlink()
    with (bundle / "run.json").open("a") as file:
        file.write(" ")
    (bundle / "notes.txt").write_text("mine")
    (bundle / "System Volume Information").mkdir()
    (bundle / "System Volume Information" / "IndexerVolumeGuid").write_text("Windows")
    (bundle / "vectors" / "._part-000000.parquet").write_text("macOS")
    lines = list(verify_bundle(str(bundle)).faults)
    assert sorted(lines) == [
        "notes.txt: extra, not in the manifest",
        "run.json: damaged, 13 bytes instead of 12",
        f"vectors/{first.name}: damaged, its sha256 is wrong",
        f"vectors/{second.name}: missing",
    ]
    refused("damaged.* and 3 more; run verify", import_bundle, str(bundle), str(tmp_path / "db"))
    assert not (tmp_path / "db").exists()


def test_every_flipped_bit_of_a_manifest_is_detected(bundle, tmp_path):
    text = (bundle / MANIFEST).read_bytes()
    rng, unnoticed = np.random.default_rng(0), 0
    for place in rng.choice(len(text), 60, replace=False):
        changed = bytearray(text)
        changed[place] ^= 1 << int(rng.integers(0, 8))
        (bundle / MANIFEST).write_bytes(changed)
        with contextlib.suppress(InputError):  # white space between the values may change
            assert Manifest.from_json(bytes(changed), "m") == Manifest.from_json(text, "m")
            unnoticed += 1
            continue
        refused("manifest.json", verify_bundle, str(bundle))
    assert unnoticed < 20


def forged(bundle: Path, change: dict) -> None:
    """Changes a manifest as one who knows how its digest is made."""
    body = json.loads((bundle / MANIFEST).read_text())
    del body["sha256"]
    body["format"] = change.pop("format", body["format"])
    body["head"] |= change
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen": "int3"}, "the manifest's chosen is none"),
        ({"index": "flat"}, "the manifest's index is none"),
        ({"schema": "AAAA"}, "the manifest's schema is none"),
        ({"rejects_schema": "!"}, "the manifest's schema is none"),
        ({"rows": 7}, "the manifest's rows is none"),
        ({"rows": "many"}, "its head has a rows of another type"),
        ({"metadata": {"plan": 3}}, "the manifest's metadata is none"),
        ({"metadata": "x"}, "its head has a metadata of another type"),
        ({"table": "../x"}, "must be letters"),
        ({"format": "bioscan_jax bundle 2"}, "it is of another version of bioscan_jax"),
        ({"format": "zip"}, "has the format 'zip'"),
    ],
)
def test_an_invalid_manifest_head_is_rejected(bundle, tmp_path, change, says):
    forged(bundle, dict(change))
    refused(says, import_bundle, str(bundle), str(tmp_path / "db"))
    assert not (tmp_path / "db").exists()


def test_a_bundle_of_another_version_is_not_overwritten(made, bundle):
    forged(bundle, {"format": "bioscan_jax bundle 2"})
    before = contents(bundle)
    refused("it is of another version", carry, made, bundle)
    assert contents(bundle) == before


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, '{"sha256":' + "9" * 5000 + "}", "[]", "7", ""])
def test_json_that_is_no_manifest_is_rejected(bundle, text):
    (bundle / MANIFEST).write_text(text)
    refused("is damaged", verify_bundle, str(bundle))


def test_an_oversized_manifest_is_not_read(bundle):
    with (bundle / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    refused("more than a manifest ever has", verify_bundle, str(bundle))


def test_links_in_a_bundle_are_not_followed(bundle, tmp_path):
    secret = tmp_path / "secret"
    shutil.copytree(bundle / "vectors", secret)
    first = sorted((bundle / "vectors").iterdir())[0]
    first.unlink()
    first.symlink_to(secret / first.name)
    assert list(verify_bundle(str(bundle)).faults) == [f"vectors/{first.name}: a link or no plain file"]
    shutil.rmtree(bundle / "vectors")
    (bundle / "vectors").symlink_to(secret)
    lines = list(verify_bundle(str(bundle)).faults)
    assert "vectors/part-000000.parquet: its directory is a link or a file" in lines
    (tmp_path / "manifest").write_bytes((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to(tmp_path / "manifest")
    refused("manifest.json is a link", verify_bundle, str(bundle))


CLIMBING = ["../x", "a/../../x", "/etc/passwd", "C:/x", "c:x", "a\\..\\x", "\\\\host\\x", "..", "a/..", ""]
REFUSED = ["CON", "a/nul.txt", "com1", "LPT9.parquet", "x.", "x ", "a./b", "ab:c", "a<b", "a|b", "a?b", "a*b", 'a"b',
           "a\x1fb", "a//b", "./a", "a/", "COM¹", "x" * 201]  # fmt: skip


@pytest.mark.parametrize("path", CLIMBING)
def test_manifest_paths_outside_the_bundle_are_rejected(bundle, tmp_path, path):
    manifest = Manifest.from_json((bundle / MANIFEST).read_bytes(), "")
    entry = dataclasses.replace(manifest.files[0], path=path, kind="beside")
    (bundle / MANIFEST).write_text(Manifest(manifest.head, (*manifest.files, entry)).to_json())
    says = "no path" if not path else "leads out of the directory"
    refused(f"{re.escape(repr(path))}, which (is|leads).*", import_bundle, str(bundle), str(tmp_path / "db"))
    refused(says, verify_bundle, str(bundle))
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("path", REFUSED)
def test_names_invalid_on_windows_are_rejected(path):
    refused("which Windows refuses|no room for more", check_path, path, "it")


@pytest.mark.parametrize("path", ["vectors/part-000001.parquet", "conference/a.b", "a-b_c (1).json", "aux1", "é.json"])
def test_other_names_are_accepted(path):
    check_path(path, "it")


def test_a_forged_manifest_cannot_plant_a_table(bundle, tmp_path):
    manifest = Manifest.from_json((bundle / MANIFEST).read_bytes(), "")
    (bundle / "beside/others.lance").mkdir(parents=True)
    shutil.copyfile(bundle / "run.json", bundle / "beside/others.lance/x")
    run = next(entry for entry in manifest.files if entry.kind == "run")
    planted = dataclasses.replace(run, path="beside/others.lance/x", kind="beside")
    (bundle / MANIFEST).write_text(Manifest(manifest.head, (*manifest.files, planted)).to_json())
    refused("would lie where tables do", import_bundle, str(bundle), str(tmp_path / "db"))
    refused("is damaged .its head lacks .*chosen", Manifest.from_json, Manifest({"table": "t"}, ()).to_json(), "m")
    for broken in ({"files": [{"path": 3}]}, {"files": 7}, {"head": []}, {"format": "other"}):
        body = json.loads((bundle / MANIFEST).read_text()) | broken
        (tmp_path / "m").write_text(json.dumps(body))
        refused("is damaged", Manifest.from_json, (tmp_path / "m").read_bytes(), "m")


KILLS = [
    {"at": "bioscan_jax.location:Directory.put"},
    {"at": "bioscan_jax.location:Directory.put", "after": True},
    {"at": "bioscan_jax.location:Directory.put", "nth": 4},
    {"at": "bioscan_jax.output:os.replace", "nth": 5, "after": True},
    {"at": "pyarrow.parquet:write_table", "nth": 6, "after": True},
    {"at": "bioscan_jax.location:Directory.remove"},
]


@pytest.mark.parametrize("precision", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_a_killed_export_resumes_to_the_same_bundle(made, tmp_path, precision):
    given = {"source": made, "precision": precision, "part_bytes": PARTS, "progress": False}
    export_bundle(**given, target=str(tmp_path / "once"))
    wanted = contents(tmp_path / "once")
    jobs = []
    for number, point in enumerate(KILLS):
        arguments = given | {"target": str(tmp_path / str(number))}
        jobs.append({"call": "bioscan_jax.bundles.bundle:bundle", "args": arguments, **point})
    assert run_killed(jobs, tmp_path) == [signal.SIGKILL] * len(jobs)
    kept = []
    for number in range(len(jobs)):
        target = tmp_path / str(number)
        if number < len(jobs) - 1:
            assert not (target / MANIFEST).exists()
            says = "unfinished export; run that export again" if (target / JOURNAL).exists() else "it is no bundle"
            refused(says, verify_bundle, str(target))
        kept.append(export_bundle(**given, target=str(target)).kept)
        assert contents(target) == wanted
    assert kept[0] == 0
    assert kept[-1] == len(wanted) - 1
    assert 0 < kept[3] < kept[-1]


@pytest.mark.slow
def test_exports_and_imports_killed_at_random_moments(made, whole, tmp_path):
    wanted, table = contents(whole), read(made)
    jobs = []
    for number in range(30):
        given = {"source": made, "target": str(tmp_path / f"b{number}"), "part_bytes": PARTS, "progress": False}
        jobs.append({"call": "bioscan_jax.bundles.bundle:bundle", "args": given, "seconds": 0.01 * (number + 1)})
        given = {"source": str(whole), "target": str(tmp_path / f"d{number}")}
        jobs.append({"call": "bioscan_jax.bundles.merge:import_bundle", "args": given, "seconds": 0.01 * (number + 1)})
    killed = run_killed(jobs, tmp_path)
    assert killed.count(signal.SIGKILL) > 10
    for number in range(30):
        export_bundle(**jobs[2 * number]["args"])
        assert contents(tmp_path / f"b{number}") == wanted
        import_bundle(**jobs[2 * number + 1]["args"])
        assert same_bits(read(tmp_path / f"d{number}"), table)


def test_a_killed_import_resumes(made, whole, tmp_path):
    points = [
        {"at": "lance:write_dataset", "nth": 1, "after": True},
        {"at": "bioscan_jax.bundles.merge:append_files", "nth": 2, "after": True},
        {"at": "bioscan_jax.bundles.merge:append_files", "nth": 3},
        {"at": "bioscan_jax.bundles.merge:build_indexes"},
    ]
    jobs = []
    for number, point in enumerate(points):
        given = {"source": str(whole), "target": str(tmp_path / str(number))}
        jobs.append({"call": "bioscan_jax.bundles.merge:import_bundle", "args": given, **point})
    assert run_killed(jobs, tmp_path) == [signal.SIGKILL] * len(jobs)
    assert [len(read(tmp_path / str(number))) for number in range(4)] == sorted(
        len(read(tmp_path / str(number))) for number in range(4)
    )
    for number in range(len(points)):
        done = import_bundle(str(whole), str(tmp_path / str(number)))
        assert done.inserted + done.existing == 429
        assert done.indexes == ("sequence_id: BTREE", "vector: IVF_SQ")
        for name in ("sequences", "sequences_rejects"):
            assert same_bits(read(tmp_path / str(number), name), read(made, name))


def test_a_damaged_part_is_written_again_by_the_same_export(made, bundle, whole):
    first = sorted((bundle / "vectors").iterdir())[0]
    first.write_bytes(b"")
    done = export_bundle(made, str(bundle), part_bytes=PARTS, progress=False)
    assert done.kept == done.files - 1
    assert contents(bundle) == contents(whole)


def test_another_export_or_foreign_files_are_not_overwritten(made, bundle, tmp_path):
    refused(r"holds another export \(filter None there, 'station = 1' now\)", carry, made, bundle, filter="station = 1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").write_text("mine")
    refused("is not empty .it has 'thesis.docx'", carry, made, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.docx").read_text() == "mine"


def test_a_filter_exports_only_its_rows(made, tmp_path):
    assert "rows as float32" in carry(made, tmp_path / "b", filter="depth BETWEEN 0 AND 3000 AND `genus` = 'g1'")
    import_bundle(str(tmp_path / "b"), str(tmp_path / "db"))
    wanted = [
        r for r in read(made).to_pylist() if r["depth"] is not None and 0 <= r["depth"] <= 3000 and r["genus"] == "g1"
    ]
    assert 50 < len(wanted) < 200
    assert read(tmp_path / "db").to_pylist() == wanted
    facts = lance.dataset(f"{tmp_path}/db/sequences.lance").schema.metadata
    assert json.loads(facts[b"bundle"])["filter"] == "depth BETWEEN 0 AND 3000 AND `genus` = 'g1'"


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("order = 'it''s \"order\"'", 1),
        ("\"order\" = 'Diptera' AND ORDER <> 'x'", 2),
        ("`order` = 'Diptera' OR \"Depth\" > 3", 3),
        ("border IS NULL", 4),
    ],
)
def test_names_in_a_filter_follow_standard_sql(tmp_path, condition, rows):
    order = ["Diptera", "Diptera", 'it\'s "order"', None]
    table = pa.table({"order": order, "Depth": [1, 2, 3, 4], "border": pa.nulls(4, pa.string())})
    found = lance.write_dataset(table, str(tmp_path / "t.lance"))
    assert found.count_rows(check_condition(condition)) == rows


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("nonesuch = 1", "No field named nonesuch"),
        ('genus = "g1"', "No field named"),
        ("1 = 1; DROP TABLE sequences", "is no SQL condition"),
        ("1 = 1) UNION SELECT * FROM x --", "is no SQL condition"),
        ("1 = 1) UNION (SELECT 1 WHERE 1 = 1", "is no SQL condition"),
        ("1 = 1 THEN 1 END, CASE WHEN 1 = 1", "is no SQL condition"),
        ("station = 1 genus = 'g1'", "is no SQL condition"),
        ("station = 1, true", "is no SQL condition"),
        ("", "is no SQL condition"),
        ("station IN (SELECT 1)", "is no condition"),
        ("station", "is no condition"),
        ("station = 99", "has no row for which --filter holds"),
    ],
)
def test_a_filter_must_be_one_condition(made, tmp_path, condition, says):
    refused(says, carry, made, tmp_path / "b", filter=condition)
    assert not (tmp_path / "b").exists()


def test_a_budget_chooses_the_most_exact_precision_that_fits(made, tmp_path):
    sizes, told = {}, carry(made, tmp_path / "all", budget="1GB").splitlines()
    assert told[0] == "recall@10 of 256 rows among 429, against float32:"
    for line in told[1:5]:
        name, size, cost = re.match(r"  (\w+) +about +([\d,]+) bytes  recall@10 ([\d.]+)", line).groups()
        sizes[name] = int(size.replace(",", "")), float(cost)
    assert list(sizes) == ["float32", "float16", "int8", "pq"]
    assert [size for size, _ in sizes.values()][:3] == sorted((s for s, _ in list(sizes.values())[:3]), reverse=True)
    assert sizes["float32"][1] == 1.0
    assert 0 < sizes["pq"][1] < sizes["int8"][1] < 1.0001
    table = np.stack(read(made)["vector"].to_pylist()).astype(np.float32)
    for name in ("float16", "int8"):
        target = tmp_path / name
        told = carry(made, target, budget=str(sizes[name][0]))
        assert re.search(rf"{name} .*<- chosen", told)
        assert "over the budget" in told
        assert f"rows as {name} in" in told
        assert sum(map(len, contents(target).values())) <= sizes[name][0]
        import_bundle(str(target), str(tmp_path / f"{name}.db"))
        dataset = lance.dataset(f"{tmp_path}/{name}.db/sequences.lance")
        assert dataset.schema.field("vector").type.value_type == (pa.float16() if name == "float16" else pa.float32())
        found = np.stack(read(tmp_path / f"{name}.db")["vector"].to_pylist()).astype(np.float32)
        bound = np.abs(table) * 2**-11 + 1e-7 if name == "float16" else (table.max(0) - table.min(0)) / 500
        assert (np.abs(found - table) <= bound).all()
        assert json.loads(dataset.schema.metadata[b"bundle"])["precision"] == name
        rest = [column for column in read(made).column_names if column != "vector"]
        assert read(tmp_path / f"{name}.db").select(rest).to_pylist() == read(made).select(rest).to_pylist()
    refused("--budget 1,000 bytes is too small: .* needs about", carry, made, tmp_path / "none", budget="1KB")
    assert not (tmp_path / "none").exists()


def test_the_estimate_is_near_the_size_of_the_bundle(tmp_path):
    make_table(tmp_path / "db", 1500, hidden=64)
    for precision in ("float32", "float16", "int8", "pq"):
        carry(str(tmp_path / "db"), tmp_path / precision, precision=precision)
        estimate = json.loads((tmp_path / precision / MANIFEST).read_text())["head"]["estimate"]
        size = sum(map(len, contents(tmp_path / precision).values()))
        parts = len(list((tmp_path / precision / "vectors").iterdir()))
        assert size <= estimate <= 1.3 * size + 65536 * (parts + 4)


@pytest.mark.parametrize("flag", ["recall_queries", "recall_rows"])
def test_too_small_numbers_are_rejected(made, tmp_path, flag):
    refused(f"--{flag} 0 is too small", carry, made, tmp_path / "b", **{flag: 0})
    refused("both decide the precision", carry, made, tmp_path / "b", precision="pq", budget="1GB")


@pytest.mark.parametrize(
    ("text", "size"), [("25GB", 25 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2kb", 2000), ("1TB", 10**12)]
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 fortnight", "1e9", "nan"])
def test_invalid_sizes_are_rejected(text):
    refused("is no size; pass one such as 25GB", parse_bytes, text)


def test_too_little_space_is_reported_before_writing(made, tmp_path, monkeypatch):
    """SIMULATED: the disk is made to say that it is nearly full."""
    monkeypatch.setattr(location.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    refused("bytes are needed and 5,000 are free; free space, or pass --budget", carry, made, tmp_path / "b")
    assert not (tmp_path / "b" / MANIFEST).exists()
    assert contents(tmp_path) == {}


def test_an_unmounted_target_is_rejected(made, tmp_path, monkeypatch):
    """SIMULATED: tmp_path stands for /media."""
    monkeypatch.setattr(location, "MOUNT_POINTS", (str(tmp_path),))
    (tmp_path / "stick").mkdir()
    refused("nothing is mounted at or above it", carry, made, tmp_path / "stick" / "bundle")
    monkeypatch.setattr(location.os.path, "ismount", lambda path: str(path) == str(tmp_path / "stick"))
    carry(made, tmp_path / "stick" / "bundle")
    monkeypatch.undo()
    refused("there is no .*/away; is the disk mounted", carry, made, tmp_path / "away" / "bundle")
    refused("a file stands there", carry, made, Path(made) / "sequences.run.json")
    refused("is empty; pass a directory", export_bundle, made, "", progress=False)
    refused("no such directory; is the disk mounted", verify_bundle, str(tmp_path / "away"))
    refused("no such directory; is the disk mounted", import_bundle, str(tmp_path / "away"), str(tmp_path / "db"))
    refused("it is no bundle; check the path", verify_bundle, made)


def test_included_files_are_imported_beside_the_table(made, tmp_path):
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "deep" / "weights").write_bytes(b"\x00" * 99)
    (tmp_path / "notes.json").write_text('{"species": 0.97}')
    along = [str(tmp_path / "adapter"), str(tmp_path / "notes.json")]
    carry(made, tmp_path / "b", beside=along)
    assert list(verify_bundle(str(tmp_path / "b")).faults) == []
    for _ in range(2):
        import_bundle(str(tmp_path / "b"), str(tmp_path / "db"))
        for name in ("adapter/adapter_config.json", "adapter/deep/weights", "notes.json"):
            assert (tmp_path / "db" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / "db" / "notes.json").write_text("mine")
    refused("notes.json is there and differs", import_bundle, str(tmp_path / "b"), str(tmp_path / "db"))
    assert (tmp_path / "db" / "notes.json").read_text() == "mine"
    (tmp_path / "notes.json").write_text('{"species": 0.98}')
    refused("holds another export .beside", carry, made, tmp_path / "b", beside=along)


def test_a_missing_adapter_is_reported(made, tmp_path):
    shutil.copytree(made, tmp_path / "db")
    assert "\nadapter" not in carry(str(tmp_path / "db"), tmp_path / "a")
    table = lance.dataset(str(tmp_path / "db" / "sequences.lance"))
    table.update_schema_metadata({"adapter_sha256": "5" * 64})
    assert "adapter left out: queries can only be" in carry(str(tmp_path / "db"), tmp_path / "b")
    (tmp_path / "coi-adapter").mkdir()
    (tmp_path / "coi-adapter" / "adapter_config.json").write_text("{}")
    told = carry(str(tmp_path / "db"), tmp_path / "c", beside=[str(tmp_path / "coi-adapter")])
    assert told.endswith("\nadapter included")


def test_a_calibration_is_included_only_with_its_rows_and_vectors(made, tmp_path):
    source = Path(shutil.copytree(made, tmp_path / "source"))
    (source / "sequences.calibration.json").write_text('{"of": "these rows"}')
    assert "calibration included" in carry(str(source), tmp_path / "b")
    import_bundle(str(tmp_path / "b"), str(tmp_path / "db"), "fish")
    assert (tmp_path / "db" / "fish.calibration.json").read_text() == '{"of": "these rows"}'
    some = carry(str(source), tmp_path / "some", filter="source_row < 50")
    assert "calibration left out: it was fitted with rows that --filter leaves out" in some
    assert "calibration left out: it was fitted on float32" in carry(str(source), tmp_path / "i", precision="int8")
    assert "calibration" not in {p.name.split(".")[0] for p in (tmp_path / "i").iterdir()}
    (source / "sequences.calibration.json").write_text('{"of": "others"}')
    refused("holds another export .calibration_sha256", carry, str(source), tmp_path / "b")
    import_bundle(str(tmp_path / "some"), str(tmp_path / "grown"))
    import_bundle(str(tmp_path / "b"), str(tmp_path / "grown"))
    assert (tmp_path / "grown" / "sequences.calibration.json").exists()


def test_names_invalid_on_a_stick_are_rejected_before_writing(made, tmp_path):
    for name, says in {"aux.json": "Windows refuses", "what?": "Windows refuses", "end.": "Windows refuses"}.items():
        (tmp_path / "w").mkdir(exist_ok=True)
        (tmp_path / "w" / name).write_text("x")
        refused(says, carry, made, tmp_path / "b", beside=[str(tmp_path / "w")])
        (tmp_path / "w" / name).unlink()
    (tmp_path / "w" / "A").write_text("x")
    (tmp_path / "w" / "a").write_text("x")
    refused("are one file on a stick", carry, made, tmp_path / "b", beside=[str(tmp_path / "w")])
    refused("no such file or directory", carry, made, tmp_path / "b", beside=[str(tmp_path / "nothing")])
    (tmp_path / "w" / "a").unlink()
    refused("has 'w/A' too", carry, made, tmp_path / "b", beside=[str(tmp_path / "w")] * 2)
    with (tmp_path / "w" / "A").open("wb") as file:
        file.truncate(4 << 30)
    refused("FAT32 takes 4 GiB at most", carry, made, tmp_path / "b", beside=[str(tmp_path / "w")])
    assert not (tmp_path / "b").exists()


def test_only_tables_of_the_same_model_merge(made, whole, tmp_path):
    make_table(tmp_path / "db", 200, prefix="t", seed=1, index="ivf_sq")
    before = read(tmp_path / "db")
    done = import_bundle(str(whole), str(tmp_path / "db"))
    assert (done.inserted, done.existing) == (429, 0)
    after = read(tmp_path / "db")
    assert after.to_pylist() == before.to_pylist() + read(made).to_pylist()
    dataset = lance.dataset(f"{tmp_path}/db/sequences.lance")
    assert {i.name: i.num_rows_indexed for i in dataset.describe_indices()}["vector_idx"] == len(after)
    assert query("SELECT count(*) AS n FROM sequences_rejects", str(tmp_path / "db"))["n"][0].as_py() == 29 + 71
    for number, changed in enumerate(
        ({"weights": "v" * 64}, {"made_by": {"pooling": "cls"}}, {"made_by": {"adapter_sha256": "a"}})
    ):
        make_table(tmp_path / str(number), 100, prefix="t", **changed)
        refused("was made by something else", import_bundle, str(whole), str(tmp_path / str(number)))
        assert len(read(tmp_path / str(number))) == 86


def test_an_unfinished_table_is_not_changed(whole, tmp_path):
    make_table(tmp_path / "db", 300, prefix="t", finish=False)
    lance.dataset(f"{tmp_path}/db/sequences.lance").delete("source_row >= 200")
    refused("is unfinished .214 of 300 rows.", import_bundle, str(whole), str(tmp_path / "db"))
    assert len(read(tmp_path / "db")) == 171


def test_the_same_id_with_another_sequence_is_rejected(made, whole, tmp_path):
    import_bundle(str(whole), str(tmp_path / "db"))
    lance.dataset(f"{tmp_path}/db/sequences.lance").update({"dna_sequence": "'TTTT'"}, where="sequence_id = 's8'")
    refused("1 rows, the first 's8', have another dna_sequence", import_bundle, str(whole), str(tmp_path / "db"))


def test_columns_missing_on_one_side_are_null(made, whole, tmp_path):
    import_bundle(str(whole), str(tmp_path / "db"))
    dataset = lance.dataset(f"{tmp_path}/db/sequences.lance")
    dataset.delete("source_row < 100")
    dataset.drop_columns(["station"])
    dataset.add_columns(pa.schema([("mine", pa.string())]))
    dataset.update({"mine": "'yes'"})
    import_bundle(str(whole), str(tmp_path / "db"))
    rows = {row["sequence_id"]: row for row in read(tmp_path / "db").to_pylist()}
    assert len(rows) == 429
    assert (rows["s0"]["station"], rows["s0"]["mine"]) == (0, None)
    assert (rows["s200"]["station"], rows["s200"]["mine"]) == (None, "yes")
    dataset = lance.dataset(f"{tmp_path}/db/sequences.lance")
    dataset.drop_columns(["station"])
    dataset.add_columns({"ours": "'x'"})
    refused("column 'ours' must not be null", import_bundle, str(whole), str(tmp_path / "db"))
    dataset.drop_columns(["ours"])
    dataset.add_columns({"station": "'north'"})
    refused(
        "column 'station' is int32 in the bundle, string in the table", import_bundle, str(whole), str(tmp_path / "db")
    )
    dataset.drop_columns(["station"])
    dataset.add_columns({"Station": "'north'"})
    refused(
        "'station' in the bundle, 'Station' in the table differ only", import_bundle, str(whole), str(tmp_path / "db")
    )


def test_half_floats_are_kept_and_merge_with_floats(tmp_path):
    make_table(tmp_path / "half", 100, dtype="float16")
    carry(str(tmp_path / "half"), tmp_path / "b")
    import_bundle(str(tmp_path / "b"), str(tmp_path / "new"))
    assert same_bits(read(tmp_path / "new"), read(tmp_path / "half"))
    make_table(tmp_path / "full", 50, prefix="t")
    import_bundle(str(tmp_path / "b"), str(tmp_path / "full"))
    found = read(tmp_path / "full")["vector"].to_pylist()[-86:]
    assert np.array_equal(np.array(found), np.array(read(tmp_path / "half")["vector"].to_pylist(), np.float32))
    refused("the table's vectors are float16", carry, str(tmp_path / "half"), tmp_path / "c", precision="float32")


def test_a_running_import_or_export_is_not_disturbed(made, whole, tmp_path):
    with writer_lock(str(tmp_path / "db"), "sequences"):
        refused("is being written by process", import_bundle, str(whole), str(tmp_path / "db"))
    with machine_lock(f"{tmp_path}/b/sequences", "the bundle"):
        refused("is being written by process", carry, made, tmp_path / "b")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    with place_lock(location.locate("memory://bucket/b", "target"), "sequences", "the bundle"):
        refused(
            "bundle sequences is being written by process", export_bundle, made, "memory://bucket/b", progress=False
        )
        assert len(memory.find("/bucket")) == 1
    memory.store.clear()


def test_a_bucket_holds_the_same_bundle_as_a_directory(made, whole, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    try:
        told = carry(made, "memory://bucket/b")
        found = {path: memory.cat_file(path) for path in memory.find("/bucket/b")}
        assert {path.removeprefix("/bucket/b/"): data for path, data in found.items()} == contents(whole)
        assert "memory://bucket/b" in told
        assert list(verify_bundle("memory://bucket/b").faults) == []
        import_bundle("memory://bucket/b", str(tmp_path / "db"))
        assert same_bits(read(tmp_path / "db"), read(made))
        memory.pipe_file(
            "/bucket/b/vectors/part-000001.parquet", b"x" * len(found["/bucket/b/vectors/part-000001.parquet"])
        )
        assert list(verify_bundle("memory://bucket/b").faults) == [
            "vectors/part-000001.parquet: damaged, its sha256 is wrong"
        ]
        refused("part-000001.parquet: damaged", import_bundle, "memory://bucket/b", str(tmp_path / "other"))
        memory.rm_file(f"/bucket/b/{MANIFEST}")
        refused("it is no bundle", verify_bundle, "memory://bucket/b")
        assert "written earlier" not in carry(made, "memory://bucket/c")
        assert f"{len(contents(whole)) - 1:,} of them written earlier" in carry(made, "memory://bucket/c")
    finally:
        memory.store.clear()
    refused("install that driver", verify_bundle, "nonesuch://bucket/b")


def test_the_command_exports_verifies_imports_and_reports_errors(made, tmp_path):
    script = functools.partial(call, "bundle")
    (tmp_path / "notes.json").write_text("{}")
    along = ["--with", tmp_path / "notes.json", "--with", Path(made) / "sequences.run.json"]
    exported = script("export", "--source", made, "--target", tmp_path / "b", *along)
    assert exported.returncode == 0, exported.stderr
    assert re.match(rf"{tmp_path}/b: 429 rows as float32 in 5 files, [\d,]+ bytes\n$", exported.stdout)
    (tmp_path / "b" / "run.json").unlink()
    verified = script("verify", "--target", tmp_path / "b")
    assert (verified.returncode, verified.stdout) == (2, "run.json: missing\n4 of 5 files are whole\n")
    assert verified.stderr.startswith(f"error: {tmp_path}/b: 1 files are damaged, missing or extra; ")
    assert verified.stderr.count("\n") == 1
    assert "--with PATH" in " ".join(script("export", "--help").stdout.split())
    assert (script("--help").returncode, "Each has its own help" in script("--help").stdout) == (0, True)
    unknown = script("send")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "error: no mode 'send'; pass one of export, verify, import first\n",
    )
