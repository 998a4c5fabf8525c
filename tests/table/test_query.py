import csv
import functools
import json
import math

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.commands import call
from support.tables import make_table, read

from bioscan_jax.errors import InputError
from bioscan_jax.table.query import explain, format_table, query, stream, write

DEPTHS = "SELECT sequence_id, genus, depth FROM sequences WHERE depth BETWEEN 0 AND 3000 ORDER BY sequence_id"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("db")
    make_table(directory)
    return str(directory)


def lance_reads(plan: str) -> list[str]:
    return [line.strip() for line in plan.split("Lance reads:", 1)[1].splitlines() if "LanceRead" in line]


def test_the_depth_query_skips_null_depths(uri):
    rows = [row for row in read(uri).to_pylist() if row["depth"] is not None and 0 <= row["depth"] <= 3000]
    rows.sort(key=lambda row: row["sequence_id"])
    assert 100 < len(rows) < 400
    assert query(DEPTHS, uri).to_pylist() == [{k: row[k] for k in ("sequence_id", "genus", "depth")} for row in rows]


@pytest.mark.parametrize(
    ("where", "pushed"),
    [
        ("depth BETWEEN 0 AND 3000", "depth >= Float64(-0) AND depth <= Float64(3000)"),
        ("12.5 < sequences.DEPTH AND 1 = 1", "depth >= Float64(12.5) OR depth < Float64(-inf)"),
        ("depth > 12.5", "depth >= Float64(12.5) OR depth < Float64(-inf)"),
        ("depth >= -3 AND depth < 7", "depth >= Float64(-3) AND depth <= Float64(7)"),
        ("station = 3", "station = Int32(3)"),
        ("genus = 'g1'", 'genus = Utf8("g1")'),
        ("depth IS NULL", "depth IS NULL"),
    ],
)
def test_lance_filters_where_it_can_and_reads_no_vector(uri, where, pushed):
    reads = "\n".join(lance_reads(explain(f"SELECT sequence_id, depth FROM sequences WHERE {where}", uri)))
    assert pushed in reads
    assert "vector" not in reads


def test_vectors_are_read_only_if_selected(uri):
    assert "vector" not in explain("SELECT * EXCLUDE vector FROM sequences", uri).split("Lance reads:")[1]
    assert "vector" in explain("SELECT vector[1] FROM sequences", uri).split("Lance reads:")[1]
    first = query("SELECT vector FROM sequences ORDER BY source_row LIMIT 1", uri)["vector"][0].as_py()
    assert first == read(uri)["vector"][0].as_py()


def test_half_float_vectors_are_read_as_floats(tmp_path):
    table = make_table(tmp_path, 60, dtype="float16")
    found = query("SELECT sequence_id, vector FROM sequences ORDER BY source_row", str(tmp_path))
    assert np.array_equal(
        np.stack(found["vector"].to_pylist()).astype(np.float16), np.stack(table["vector"].to_pylist())
    )
    assert query("SELECT count(*) AS n FROM sequences WHERE station > 5", str(tmp_path))["n"][0].as_py() > 5


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 0.1, 1e-310]), st.floats(width=32)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.one_of(st.none(), FLOATS), min_size=1, max_size=12),
    bound=st.one_of(st.sampled_from([0.0, -0.0, 0.1, 0.7]), st.floats(-1e6, 1e6)),
    test=st.sampled_from(
        [
            "d >= {0}",
            "d > {0}",
            "d BETWEEN -{1} AND {1}",
            "f >= {0}",
            "f > {0} AND d > {0}",
            "d >= -{1} AND d < {1}",
            "f > -{1} AND f <= {1}",
            "f < {0}",
            "d <= {0} AND f <> {0}",
            "f < {0} OR d < {0}",
        ]
    ),
)
@example(values=[-math.nan, -1.0, math.nan], bound=0.0, test="f < {0}")
@example(values=[-math.nan, -1.0, math.nan], bound=0.0, test="d <= {0} AND f <> {0}")
def test_float_bounds_give_the_rows_of_plain_duckdb(tmp_path_factory, values, bound, test):
    directory = tmp_path_factory.mktemp("floats")
    doubles = pa.array(values, pa.float64())
    with np.errstate(over="ignore"):
        table = pa.table({"i": range(len(values)), "d": doubles, "f": doubles.cast(pa.float32(), safe=False)})
    lance.write_dataset(table, str(directory / "t.lance"))
    sql = f"SELECT i FROM t WHERE {test.format(repr(bound), repr(abs(bound)))} ORDER BY i"
    with duckdb.connect() as memory:
        memory.register("t", table)
        wanted = [row[0] for row in memory.sql(sql).fetchall()]
    assert query(sql, str(directory), "t")["i"].to_pylist() == wanted


def test_a_renamed_column_is_not_confused_with_another(uri):
    swapped = "SELECT count(*) AS n FROM (SELECT depth AS station, station::DOUBLE AS depth FROM sequences)"
    rows = read(uri).to_pylist()
    assert query(f"{swapped} WHERE depth >= 9", uri)["n"][0].as_py() == sum(row["station"] >= 9 for row in rows)
    deep = sum(row["depth"] is not None and row["depth"] >= 9 for row in rows)
    assert query(f"{swapped} WHERE station >= 9", uri)["n"][0].as_py() == deep


def test_a_bound_on_one_of_two_scans_does_not_affect_the_other(uri):
    rows = read(uri).to_pylist()
    deep = [row["station"] for row in rows if row["depth"] is not None and row["depth"] >= 3000]
    pairs = sum(row["station"] == station for row in rows for station in deep)
    for one, two in (("a", "b"), ("b", "a")):
        twice = f"SELECT count(*) AS n FROM sequences {one} JOIN sequences {two} USING (station) WHERE a.depth >= 3000"
        assert query(twice, uri)["n"][0].as_py() == pairs
    union = "SELECT count(*) AS n FROM (SELECT 1 FROM sequences WHERE depth >= 3000 UNION ALL SELECT 1 FROM sequences)"
    assert query(union, uri)["n"][0].as_py() == len(deep) + len(rows)


@pytest.mark.parametrize(
    "sql",
    [
        "WITH sequences AS (SELECT -depth AS depth FROM sequences) SELECT count(*) FROM sequences WHERE depth > -50",
        "SELECT count(*) FROM (SELECT -depth AS depth FROM sequences) WHERE depth > -50",
        "SELECT count(*) FROM sequences AS s(a, b, c, d, e, depth) WHERE depth > 3",
        "SELECT -depth AS depth FROM sequences WHERE depth > 3000",
        "SELECT count(*) FROM sequences WHERE depth > 3000 OR station = 1",
        "SELECT count(*) FROM sequences WHERE NOT depth > 3000",
        "SELECT (SELECT count(*) FROM query_table('sequences')), count(*) FROM sequences WHERE depth > 3000",
        "SELECT count(*) FROM (SELECT 3000 AS most) o WHERE (SELECT count(*) FROM sequences WHERE depth > most) > 3",
    ],
)
def test_names_that_mean_something_else_get_no_bound(uri, sql):
    with duckdb.connect() as memory:
        memory.register("sequences", read(uri))
        assert query(sql, uri).to_pylist() == memory.sql(sql).to_arrow_table().to_pylist()


def test_a_bound_on_a_field_of_a_struct_is_none_on_a_column_of_its_name(tmp_path):
    table = pa.table({"d": [1.0, 2.0], "s": [{"d": 9.0}, {"d": 0.0}], "t": [{"d": 9.0}, {"d": 0.0}]})
    lance.write_dataset(table, str(tmp_path / "t.lance"))
    assert query("SELECT d FROM t WHERE s.d > 5", str(tmp_path), "t")["d"].to_pylist() == [1.0]
    assert query("SELECT d FROM t AS x WHERE t.d > 5", str(tmp_path), "t")["d"].to_pylist() == [1.0]
    assert query("SELECT d FROM t AS x WHERE x.d > 1", str(tmp_path), "t")["d"].to_pylist() == [2.0]


def test_a_bound_on_a_float_is_compared_as_a_float(tmp_path):
    table = pa.table({"i": range(3), "f": pa.array([0.7, 0.1, 0.3], pa.float32())})
    lance.write_dataset(table, str(tmp_path / "t.lance"))
    for bound, wanted in ((0.7, [0]), (0.1, [0, 1, 2]), (0.3, [0, 2])):
        assert query(f"SELECT i FROM t WHERE f >= {bound} ORDER BY i", str(tmp_path), "t")["i"].to_pylist() == wanted


@pytest.mark.parametrize("extra", [pa.array(range(20), pa.int64()), pa.array(range(20), pa.duration("s"))])
@pytest.mark.parametrize("where", ["u64 >= 6", "u64 IN (7, 8)", "f >= 6 AND u64 < 19", "i > 6 AND i < 9", "f16 > 6"])
def test_types_that_lance_cannot_filter_are_filtered(tmp_path, where, extra):
    numbers = pa.array([*range(18), None, None], pa.int64())
    floats = pa.array([*np.arange(17.0), math.nan, None, -math.nan])
    columns = {"i": numbers, "u64": pa.array(range(20), pa.uint64()), "f": floats, "f16": floats.cast(pa.float16())}
    table = pa.table(columns | {"extra": extra})
    lance.write_dataset(table, str(tmp_path / "t.lance"))
    with duckdb.connect() as memory:
        memory.register("t", table.set_column(3, "f16", floats.cast(pa.float32())))
        wanted = memory.sql(f"SELECT i, u64 FROM t WHERE {where} ORDER BY u64").fetchall()
    assert wanted
    found = query(f"SELECT i, u64 FROM t WHERE {where} ORDER BY u64", str(tmp_path), "t")
    assert [tuple(row.values()) for row in found.to_pylist()] == wanted


def test_rejects_can_be_queried(uri):
    found = query("SELECT reason, count(*) AS n FROM sequences_rejects WHERE source_row >= 0 GROUP BY reason", uri)
    assert found.to_pylist() == [{"reason": "empty", "n": 71}]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("DROP TABLE sequences", "type DROP"),
        ("INSERT INTO sequences SELECT * FROM sequences", "type INSERT"),
        ("UPDATE sequences SET depth = 0", "type UPDATE"),
        ("DELETE FROM sequences", "type DELETE"),
        ("WITH x AS (DELETE FROM sequences RETURNING *) SELECT * FROM x", "Can only delete from base table"),
        ("CREATE TABLE x AS SELECT 1", "type CREATE"),
        ("COPY (SELECT 1) TO '/tmp/stolen.csv'", "type COPY"),
        ("ATTACH '/tmp/x.db'", "type ATTACH"),
        ("PRAGMA version", "type PRAGMA"),
        ("CALL pragma_version()", "type CALL"),
        ("SET threads = 1", "type SET"),
        ("INSTALL httpfs", "type LOAD"),
        ("EXPORT DATABASE 'x'", "type EXPORT"),
        ("SELECT 1; DROP TABLE sequences", "2 statements"),
        ("", "0 statements"),
        ("-- nothing", "0 statements"),
        ("SELEC 1", "syntax error"),
        ("SELECT nonesuch FROM sequences", '"nonesuch" not found'),
        ("SELECT * FROM nonesuch", "the tables are the one that --table names"),
        ("SELECT * FROM '/etc/passwd'", "does not exist"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled by configuration"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled by configuration"),
        ("SELECT * FROM glob('/*')", "disabled by configuration"),
        ("SELECT * FROM pq", "Table with name pq does not exist"),
        ("SELECT CAST(sequence_id AS INTEGER) FROM sequences", "Could not convert"),
    ],
)
def test_other_statements_than_one_select_are_rejected(uri, sql, expected):
    before = lance.dataset(f"{uri}/sequences.lance").version
    with pytest.raises(InputError) as error:
        query(sql, uri)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert lance.dataset(f"{uri}/sequences.lance").version == before


def test_tables_are_queried_by_name(uri, tmp_path):
    with pytest.raises(InputError, match=r"no table 'others' \(there are: sequences, sequences_rejects\)"):
        query("SELECT 1", uri, "others")
    with pytest.raises(InputError, match="no table 'sequences'; check"):
        query("SELECT 1", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="must be letters"):
        query("SELECT 1", uri, "../sequences")


def test_text_output_is_aligned_truncated_and_counted(uri):
    with stream("SELECT * FROM (VALUES (1, 'a'), (20, NULL), (3, repeat('x', 99))) AS t(n, name)", uri) as rows:
        lines = format_table(rows, 2).splitlines()
    assert lines[:4] == [" n  name", "--  ----", " 1  a", "20"]
    assert lines[4] == "3 rows, the first 2 shown; --output FILE.csv or FILE.parquet keeps all"
    with stream("SELECT repeat('x', 99) AS name", uri) as rows:
        assert format_table(rows, 2).splitlines()[2] == "x" * 57 + "..."
    with stream("SELECT 'a' || chr(27) || '[31m' || chr(10) || 'b' AS name", uri) as rows:
        assert format_table(rows, 2).splitlines()[2] == "a\N{REPLACEMENT CHARACTER}[31m b"
    with stream("SELECT 1", uri) as rows, pytest.raises(InputError, match="--show -1"):
        format_table(rows, -1)


def test_files_hold_every_row(uri, tmp_path):
    for name in ("rows.csv", "rows.parquet"):
        assert write(DEPTHS, uri, "sequences", str(tmp_path / name)) == query(DEPTHS, uri).num_rows
    wanted = query(DEPTHS, uri).to_pylist()
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == wanted
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sequence_id"], row["genus"] or None, float(row["depth"])) for row in rows] == [
        tuple(row.values()) for row in wanted
    ]
    write("SELECT [1, 2] AS list, {'a': NULL} AS struct", uri, "sequences", str(tmp_path / "nested.csv"))
    with (tmp_path / "nested.csv").open(newline="") as file:
        assert [json.loads(value) for value in list(csv.reader(file))[1]] == [[1, 2], {"a": None}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nested.csv", "rows.csv", "rows.parquet"]


@pytest.mark.parametrize(
    ("name", "expected"), [("rows.txt", "pass FILE.csv"), ("no/rows.csv", "there is no directory")]
)
def test_invalid_output_files_are_rejected(uri, tmp_path, name, expected):
    with pytest.raises(InputError, match=expected):
        write("SELECT 1", uri, "sequences", str(tmp_path / name))


def test_a_failing_query_leaves_no_file(uri, tmp_path):
    with pytest.raises(InputError, match="Could not convert"):
        write("SELECT CAST(sequence_id AS INTEGER) FROM sequences", uri, "sequences", str(tmp_path / "rows.csv"))
    assert list(tmp_path.iterdir()) == []


def test_the_script_answers_and_refuses_in_one_line(uri, tmp_path):
    script = functools.partial(call, "query")
    answered = script(DEPTHS, "--uri", uri, "--output", str(tmp_path / "o.csv"))
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout == f"{tmp_path / 'o.csv'}: {query(DEPTHS, uri).num_rows} rows\n"
    explained = script(DEPTHS, "--uri", uri, "--explain")
    assert explained.stderr == ""
    assert "Lance reads:" in explained.stdout
    refused = script("DELETE FROM sequences", "--uri", uri)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: the SQL is a statement of type DELETE; only one that reads is run: pass a SELECT\n"
