import gzip
import importlib
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from support.killed import run_killed
from support.places import GOLDEN, SCRIPTS
from support.tables import make_table, read, same_bits

from bioscan_jax import DataConfig, ModelConfig, SinkConfig, embed
from bioscan_jax.cli import invoke
from bioscan_jax.errors import InputError
from bioscan_jax.table.annotate import ANNOTATED, annotate
from bioscan_jax.table.lock import writer_lock

annotate_module = importlib.import_module("bioscan_jax.table.annotate")
SCRIPT = SCRIPTS / "annotate.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    make_table(directory, index="ivf_sq")
    return directory


@pytest.fixture
def uri(made, tmp_path) -> str:
    shutil.copytree(made, tmp_path / "db")
    return str(tmp_path / "db")


def metadata(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def data_files(uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(uri, "sequences.lance", "data").iterdir()}


def test_new_columns_are_joined_by_id_in_one_version(uri, tmp_path):
    before, files, version = read(uri), data_files(uri), lance.dataset(f"{uri}/sequences.lance").version
    ids = before["sequence_id"].to_pylist()[::-2]
    ships = [f"RV {i % 3}" for i in range(len(ids))]
    path = metadata(tmp_path / "m.parquet", sequence_id=[*ids, "stranger"], ship=[*ships, "x"], salt=[35.5] * 216)
    done = annotate(uri, path)
    assert (done.matched, done.unmatched, done.unused) == (215, 214, 1)
    assert (done.added, done.filled) == (("ship", "salt"), {})
    after, dataset = read(uri), lance.dataset(f"{uri}/sequences.lance")
    assert dataset.version == version + 1
    assert same_bits(after.select(before.column_names), before)
    wanted = dict(zip(ids, ships, strict=True))
    assert after["ship"].to_pylist() == [wanted.get(i) for i in before["sequence_id"].to_pylist()]
    assert after["salt"].null_count == 214
    assert [dataset.schema.field(n).metadata for n in ("ship", "salt")] == [{ANNOTATED: b"1"}] * 2
    assert files.items() <= data_files(uri).items()
    new = sum(len(v) for k, v in data_files(uri).items() if k not in files)
    assert new < sum(map(len, files.values())) / 2
    assert {i.name: i.num_rows_indexed for i in dataset.describe_indices()} == {
        "sequence_id_idx": 429,
        "vector_idx": 429,
    }
    again = annotate(uri, path)
    assert (again.added, again.filled) == ((), {"ship": 0, "salt": 0})
    assert lance.dataset(f"{uri}/sequences.lance").version == version + 1


def test_existing_columns_are_filled_and_conflicts_need_overwrite(uri, tmp_path):
    before = read(uri).to_pylist()
    ids = [row["sequence_id"] for row in before]
    path = metadata(tmp_path / "m.parquet", sequence_id=ids, genus=["new"] * 429, depth=pa.array([1] * 429), ship=ids)
    conflicts = sum(row["genus"] is not None for row in before) + sum(row["depth"] is not None for row in before)
    version = lance.dataset(f"{uri}/sequences.lance").version
    with pytest.raises(
        InputError, match=rf"{conflicts} values differ .*first: genus of 's1' is 'g1', not 'new'; pass --over"
    ):
        annotate(uri, path)
    assert lance.dataset(f"{uri}/sequences.lance").version == version
    done = annotate(uri, path, overwrite=True)
    assert done.filled == {"genus": 429, "depth": 429}
    assert lance.dataset(f"{uri}/sequences.lance").version == version + 1
    after = read(uri)
    assert set(after["genus"].to_pylist()) == {"new"}
    assert set(after["depth"].to_pylist()) == {1.0}
    assert after["ship"].to_pylist() == ids
    assert after["vector"].to_pylist() == [row["vector"] for row in before]
    assert after.column_names == [*before[0], "ship"]


def test_nulls_are_filled_and_nulls_in_the_file_are_ignored(uri, tmp_path):
    before = read(uri).to_pylist()
    null = [row["sequence_id"] for row in before if row["depth"] is None]
    full = [row["sequence_id"] for row in before if row["depth"] is not None]
    given = pa.array([math.nan, *range(len(null) - 1), None], pa.float64())
    path = metadata(tmp_path / "m.parquet", sequence_id=[*null, full[0]], depth=given)
    assert annotate(uri, path).filled == {"depth": len(null)}
    after = {row["sequence_id"]: row["depth"] for row in read(uri).to_pylist()}
    assert math.isnan(after[null[0]])
    assert [after[i] for i in null[1:]] == list(range(len(null) - 1))
    assert [after[i] for i in full] == [row["depth"] for row in before if row["depth"] is not None]
    assert annotate(uri, path).filled == {"depth": 0}  # NaN is no conflict with NaN


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.csv.gz"])
def test_text_files_take_the_types_of_the_table(uri, tmp_path, name):
    text = "sequence_id,depth,ship\ns4,12,Sonne\ns8,,\n"
    data = (text.replace(",", "\t") if "tsv" in name else text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert annotate(uri, str(tmp_path / name)).filled == {"depth": 1}
    rows = {row["sequence_id"]: row for row in read(uri).to_pylist()}
    assert (rows["s4"]["depth"], rows["s4"]["ship"]) == (12.0, "Sonne")
    assert (rows["s8"]["depth"], rows["s8"]["ship"]) == (None, None)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["s1"], "x": [1]}, "no column 'sequence_id' (columns: id, x)"),
        ({"processid": ["s1"], "x": [1]}, "pass --metadata.id_column processid if that is the one with the ids"),
        (
            {"sequence_id": ["s1"], "Genus": ["g"]},
            "has a column 'Genus' and the table one 'genus': they differ only in case",
        ),
        ({"sequence_id": ["s1"]}, "no column but sequence_id"),
        (
            {"sequence_id": ["s1", "s2", "s1"], "x": [1, 2, 3]},
            "1 sequence_ids come more than once, such as 's1' (2 times)",
        ),
        ({"sequence_id": ["s1", None], "x": [1, 2]}, "1 rows have no sequence_id"),
        ({"sequence_id": ["s1"], "vector": [1]}, "column 'vector' is an input or a result of embedding"),
        ({"sequence_id": ["s1"], "source_row": [1]}, "column 'source_row' is an input"),
        ({"sequence_id": ["s1"], "dna_sequence": ["A"]}, "column 'dna_sequence' is an input"),
        ({"sequence_id": ["s1"], "station": ["north"]}, "column 'station' is string, the table's is int32"),
        ({"sequence_id": ["s1"], " salinity": [1]}, "column ' salinity' has a name that"),
        ({"sequence_id": ["s1"], "a.b": [1]}, "has a name that Lance cannot store"),
        ({"sequence_id": ["t1", "t2"], "x": [1, 2]}, "none of its 2 sequence_ids is in"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected_without_changes(uri, tmp_path, columns, expected):
    before = {path: path.read_bytes() for path in Path(uri, "sequences.lance").rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        annotate(uri, metadata(tmp_path / "m.parquet", **columns))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path(uri, "sequences.lance").rglob("*") if path.is_file()} == before


def test_unreadable_files_are_reported_on_one_line(uri, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "ragged.csv").write_text("sequence_id,x\ns1,1,2\n")
    (tmp_path / "words.csv").write_text("sequence_id,depth\ns3,NA\ns4,deep\n")
    (tmp_path / "latin.csv").write_bytes("sequence_id,place\ns4,Tromsø\n".encode("latin-1"))
    (tmp_path / "m.xlsx").write_bytes(b"PK")
    for name, expected in {
        "none.csv": "no such file",
        "cut.parquet": "cannot be read",
        "ragged.csv": "line 2: 3 cells, but the header has 2",
        "words.csv": "line 3: column 'depth' is 'deep', but the table's type is double",
        "latin.csv": "line 2: its text is not utf-8",
        "m.xlsx": "is a spreadsheet workbook; save the sheet as CSV",
    }.items():
        with pytest.raises(InputError, match=expected) as error:
            annotate(uri, str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_an_indexed_column_is_not_filled(uri, tmp_path):
    lance.dataset(f"{uri}/sequences.lance").create_scalar_index("station", "BTREE", name="station_idx")
    with pytest.raises(InputError, match=r"column 'station' has an index \(station_idx\)"):
        annotate(uri, metadata(tmp_path / "m.parquet", sequence_id=["s1"], station=pa.array([5], pa.int32())))


def test_an_unfinished_or_busy_table_is_rejected(tmp_path, uri):
    make_table(tmp_path / "part", 300, finish=False)
    lance.dataset(f"{tmp_path}/part/sequences.lance").delete("source_row >= 200")
    path = metadata(tmp_path / "m.parquet", sequence_id=["s1"], ship=["Sonne"])
    with pytest.raises(InputError, match=r"is unfinished \(214 of 300 rows\)"):
        annotate(str(tmp_path / "part"), path)
    with writer_lock(uri, "sequences"), pytest.raises(InputError, match="is being written by process"):
        annotate(uri, path)


def _named(uri: Path, version: int) -> set[str]:
    fragments = lance.dataset(f"{uri}/sequences.lance", version=version).get_fragments()
    return {file.path for fragment in fragments for file in fragment.data_files()}


POINTS = [
    {"at": "lance.fragment:LanceFragment.update_columns"},
    {"at": "lance.fragment:LanceFragment.update_columns", "after": True},
    {"at": "lance.fragment:LanceFragment.merge_columns", "nth": 3, "after": True},
    {"at": "lance:LanceDataset.commit", "static": True},
    {"at": "lance:LanceDataset.commit", "static": True, "after": True},
]


def test_a_kill_leaves_all_or_nothing_and_the_same_command_finishes(made, tmp_path):
    before = read(made)
    ids = before["sequence_id"].to_pylist()
    path = metadata(tmp_path / "m.parquet", sequence_id=ids, ship=ids, depth=[9.0] * 429)
    jobs = []
    for number, point in enumerate(POINTS):
        shutil.copytree(made, tmp_path / str(number))
        given = {"uri": str(tmp_path / str(number)), "path": path, "overwrite": True}
        jobs.append({"call": "bioscan_jax.table.annotate:annotate", "args": given, **point})
    assert run_killed(jobs, tmp_path) == [signal.SIGKILL] * len(jobs)
    for number in range(len(jobs)):
        found, last = read(tmp_path / str(number)), number == len(jobs) - 1
        assert same_bits(found, before) != last
        assert ("ship" in found.column_names) == last
        annotate(str(tmp_path / str(number)), path, overwrite=True)
        ended = read(tmp_path / str(number))
        assert ended["ship"].to_pylist() == ids
        assert set(ended["depth"].to_pylist()) == {9.0}
        versions = [v["version"] for v in lance.dataset(f"{tmp_path / str(number)}/sequences.lance").versions()]
        named = set().union(*(_named(tmp_path / str(number), version) for version in versions))
        assert set(data_files(str(tmp_path / str(number)))) == named
        assert np.array_equal(ended["vector"].combine_chunks().flatten(), before["vector"].combine_chunks().flatten())


@pytest.mark.slow
def test_kills_at_random_moments_leave_all_or_nothing(made, tmp_path):
    before = read(made)
    ids = before["sequence_id"].to_pylist()
    path = metadata(tmp_path / "m.parquet", sequence_id=ids, ship=ids, depth=[9.0] * 429)
    jobs = []
    for number in range(40):
        shutil.copytree(made, tmp_path / str(number))
        given = {"uri": str(tmp_path / str(number)), "path": path, "overwrite": True}
        jobs.append({"call": "bioscan_jax.table.annotate:annotate", "args": given, "seconds": 0.005 * (number + 1)})
    run_killed(jobs, tmp_path)
    whole = []
    for number in range(len(jobs)):
        found = read(tmp_path / str(number))
        whole.append("ship" in found.column_names)
        assert whole[-1] or same_bits(found, before)
        annotate(str(tmp_path / str(number)), path, overwrite=True)
        assert read(tmp_path / str(number))["ship"].to_pylist() == ids
    assert not whole[0]


def test_the_script_prints_the_counts(uri, tmp_path):
    path = metadata(tmp_path / "m.parquet", sequence_id=["s1", "s4"], ship=["Sonne", "Polarstern"])
    command = [sys.executable, SCRIPT, "--uri", uri, "--metadata", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "2 rows matched, 427 of the table and 0 of the file did not; new columns: ship; filled: none",
        "  read as Parquet",
        "  ship: text, 0 null, such as 'Sonne', 'Polarstern'",
        "  only in the table: 's0', 's2', 's5'",
    ]


def test_a_dry_run_shows_what_would_change_and_changes_nothing(uri, tmp_path):
    before = {path: path.read_bytes() for path in Path(uri, "sequences.lance").rglob("*") if path.is_file()}
    text = "sequence_id;plate;depth;country\ns4;0007;12,5;NA\nx1;0008;NA;ZA\nx2;;3;\n"
    (tmp_path / "m.csv").write_bytes("\N{BOM}".encode() + text.replace("\n", "\r\n").encode())
    done = annotate(uri, str(tmp_path / "m.csv"), dry_run=True)
    assert {path: path.read_bytes() for path in Path(uri, "sequences.lance").rglob("*") if path.is_file()} == before
    assert (done.matched, done.unused, done.added, done.filled) == (1, 2, ("plate", "country"), {"depth": 1})
    assert (done.unused_ids, done.unmatched_ids) == (("x1", "x2"), ("s0", "s1", "s2"))
    assert str(done).splitlines()[1:] == [
        "  read as text delimited by semicolon, cells quoted, UTF-8; empty cells are null",
        "  plate: text, 1 null, such as '0007', '0008'",
        "  depth: double, 1 null, such as 12.5, 3.0 (decimal commas; 1 cells NA counted as null)",
        "  country: text, 1 null, such as 'NA', 'ZA'",
        "  only in the table: 's0', 's1', 's2'",
        "  only in the file: 'x1', 'x2'",
        "  dry run: nothing was written",
    ]
    wet = annotate(uri, str(tmp_path / "m.csv"))
    row = next(row for row in read(uri).to_pylist() if row["sequence_id"] == "s4")
    assert (row["plate"], row["depth"], row["country"]) == ("0007", 12.5, "NA")
    assert (wet.added, wet.filled) == (done.added, done.filled)


@pytest.mark.parametrize("words", [["--metadata", "m.txt"], ["--metadata=m.txt"], ["--metadata.path", "m.txt"]])
def test_the_command_takes_what_is_known_of_the_text(uri, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("m.txt").write_bytes('sequence_id:site\ns4:"Ærø\n'.encode("cp1252"))
    more = ["--metadata.delimiter", ":", "--metadata.quoting=none", "--metadata.encoding", "cp1252", "--dry_run"]
    invoke("annotate", ["--uri", uri, *words, *more])
    assert "site: text, 0 null, such as '\"Ærø'" in capsys.readouterr().out


def test_a_config_file_names_the_metadata_alone_or_with_its_settings(uri, tmp_path, capsys):
    (tmp_path / "m.csv").write_text("sequence_id|site\ns4|a\n")
    for number, given in enumerate([f" {tmp_path}/m.csv", f"\n  path: {tmp_path}/m.csv\n  delimiter: bar"]):
        (tmp_path / f"{number}.yaml").write_text(f"uri: {uri}\ndry_run: true\nmetadata:{given}\n")
        assert invoke("annotate", ["--config", str(tmp_path / f"{number}.yaml")]) == 0
        assert "new columns: site" in capsys.readouterr().out


def test_ids_that_repeat_or_lack_name_their_lines(uri, tmp_path):
    (tmp_path / "m.csv").write_text('sequence_id,x\ns1,"a\nb"\ns2,1\ns1,2\n')
    with pytest.raises(InputError, match=r"such as 's1' \(2 times\), in .*m.csv line 2 and .*m.csv line 5; keep"):
        annotate(uri, str(tmp_path / "m.csv"))
    (tmp_path / "m.csv").write_text("sequence_id,x\ns1,1\n,2\n")
    with pytest.raises(InputError, match=r"1 rows have no sequence_id, the first is .*m.csv line 3"):
        annotate(uri, str(tmp_path / "m.csv"))


def test_ids_that_do_not_match_are_shown_from_both_sides(uri, tmp_path):
    path = metadata(tmp_path / "m.parquet", sequence_id=["S1 ", "S2"], x=[1, 2])
    with pytest.raises(InputError, match=r"the file has 'S1 ', 'S2', the table 's0', 's1', 's2'"):
        annotate(uri, path)


def test_ids_are_hashed_once_per_stretch_of_the_table_that_is_as_long_as_the_file(uri, tmp_path, monkeypatch):
    """One lookup per batch of rows would hash all ids of the file each time."""
    calls = []
    original = annotate_module.pc.call_function

    def counted(name, *arguments, **keywords):
        calls.append(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(annotate_module.pc, "call_function", counted)
    for stretch, least in ((1, 1), (100, 1)):
        calls.clear()
        monkeypatch.setattr(annotate_module, "_SLAB_ROWS", stretch)
        ids = [f"s{i}" for i in range(500)]
        annotate(uri, metadata(tmp_path / "m.parquet", sequence_id=ids, x=ids), dry_run=True)
        assert calls.count("index_in") == least
    calls.clear()
    annotate(uri, metadata(tmp_path / "m.parquet", sequence_id=["s1"], x=["a"]))
    assert 1 < calls.count("index_in") <= 5
    assert [row["x"] for row in read(uri).to_pylist() if row["x"]] == ["a"]


def test_rows_that_were_deleted_do_not_shift_the_others(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_module, "check_finished", lambda *given: None)  # as of an imported table
    lance.dataset(f"{uri}/sequences.lance").delete("station = 5")
    left = read(uri)["sequence_id"].to_pylist()
    ids = [f"s{i}" for i in range(500)]
    path = metadata(tmp_path / "m.parquet", sequence_id=ids, ship=ids, depth=[float(i) for i in range(500)])
    annotate(uri, path, overwrite=True)
    assert read(uri)["ship"].to_pylist() == left
    assert read(uri)["depth"].to_pylist() == [float(i[1:]) for i in left]


def test_folders_of_metadata_are_joined_with_their_columns(uri, tmp_path):
    for marker, name in [("COI", "s1"), ("16S", "s2")]:
        (tmp_path / "m" / f"marker_gene={marker}").mkdir(parents=True)
        metadata(tmp_path / "m" / f"marker_gene={marker}" / "part-0.parquet", sequence_id=[name], depth=[7.5])
    done = annotate(uri, str(tmp_path / "m"), overwrite=True)
    assert done.added == ("marker_gene",)
    rows = {row["sequence_id"]: (row["marker_gene"], row["depth"]) for row in read(uri).to_pylist()}
    assert (rows["s1"], rows["s2"], rows["s4"][0]) == (("COI", 7.5), ("16S", 7.5), None)


def test_embed_still_recognises_an_annotated_table(tmp_path):
    """Embedding again expected that all is done, and the columns that came later stay."""
    rows = {"sequence_id": ["a", "b"], "dna_sequence": ["ACGTACGTAC", "GGGTACGTAC"]}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    checkpoint = GOLDEN / "v2"
    wanted = (
        ModelConfig(checkpoint=str(checkpoint)),
        DataConfig(path=str(tmp_path / "in.parquet")),
        SinkConfig(uri=f"{tmp_path}/db"),
    )
    embed(*wanted, progress=False)
    annotate(f"{tmp_path}/db", metadata(tmp_path / "m.parquet", sequence_id=["b"], cruise=["SO 242"]))
    again = embed(*wanted, progress=False)
    assert "complete before this run" in str(again)
    assert read(f"{tmp_path}/db")["cruise"].to_pylist() == [None, "SO 242"]
