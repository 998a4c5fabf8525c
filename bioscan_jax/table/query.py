"""SQL over a vector table: DuckDB plans and joins, Lance reads only the columns and rows that are needed."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from bioscan_jax.errors import InputError
from bioscan_jax.location import output_file
from bioscan_jax.notebook import show_arrow_tables
from bioscan_jax.table.reading import open_existing
from bioscan_jax.table.storage import open_dataset, table_path

if TYPE_CHECKING:
    import duckdb
    import lance

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
"""Keep a query from reading files, the network, extensions or Python variables."""
_TABLES = " (the tables are the one that --table names, and the same name with _rejects)"
_BATCH_ROWS = 8192
_MIRRORED = {"<": ">", ">": "<"}
_COMPARISONS = {
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_GREATERTHANOREQUALTO": ">",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<",
}
"""Types in DuckDB's syntax tree, with the side on which the column lies."""


@dataclass
class _Scans:
    """The filters passed to Lance beyond DuckDB's own pushdown, and the plans that Lance reports."""

    bounds: "dict[str, pc.Expression]" = field(default_factory=dict)
    """Additional filter, by name of the table."""
    plans: list[str] = field(default_factory=list)


def query(sql: str, uri: str = "vectors", table: str = "sequences") -> pa.Table:
    """Runs one read-only SELECT over a vector table and its rejects.

    The tables are called `table` and `{table}_rejects`; the query can read nothing else.

    Args:
        sql: One SELECT, WITH, FROM or VALUES statement.
        uri: Database directory or URL.
        table: Name of the vector table.

    Raises:
        InputError: There is no such table, or the SQL writes, is wrong or is more than one statement.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> sql = "SELECT count(*) AS n FROM sequences WHERE length(dna_sequence) > 0"
        >>> bj.query(sql, f"{directory}/vectors").to_pylist()
        [{'n': 6}]
    """
    show_arrow_tables()
    with stream(sql, uri, table) as reader:
        return reader.read_all()


@contextmanager
def stream(sql: str, uri: str, table: str = "sequences") -> Iterator[pa.RecordBatchReader]:
    """Runs a query as `query` does, and yields a reader of its batches."""
    with _run(sql, uri, table, _Scans()) as reader:
        yield reader


def explain(sql: str, uri: str, table: str = "sequences") -> str:
    """Runs a query and returns its plans as text: DuckDB's, then Lance's for each scan."""
    scans = _Scans()
    with _run(sql, uri, table, scans) as reader:
        for _ in reader:
            pass
        scanned = [f"Lance reads:\n{plan.strip()}" for plan in scans.plans]
    with _database(uri, table, _Scans()) as database:
        plan = database.execute(f"EXPLAIN {_only_select(sql)}").fetchall()[0][1]
    return "\n".join([plan.rstrip(), *scanned])


def write(sql: str, uri: str, table: str, output: str) -> int:
    """Writes the result of a query to a file that appears whole or not at all.

    Args:
        sql: As for `query`.
        uri: Database directory or URL.
        table: Name of the vector table.
        output: FILE.csv (lists as JSON, null empty) or FILE.parquet.

    Returns:
        The number of rows.

    Raises:
        InputError: As for `query`, or the file cannot be written.
    """
    form = Path(output).suffix
    if form not in (".csv", ".parquet"):
        raise InputError(f"--output {output}: pass FILE.csv or FILE.parquet")
    with output_file(output) as path, stream(sql, uri, table) as reader:
        return _write_csv(reader, path) if form == ".csv" else _write_parquet(reader, path)


def format_table(reader: pa.RecordBatchReader, most_rows: int) -> str:
    """Formats the first `most_rows` rows as a text table with a row count; reads all rows.

    Raises:
        InputError: `most_rows` is below 0.
    """
    if most_rows < 0:
        raise InputError(f"--show {most_rows}: pass how many rows to print, 0 to count them only")
    shown: list[list[Any]] = []
    rows = 0
    for batch in reader:
        head = batch.slice(0, max(0, most_rows - rows))
        shown += [list(row) for row in zip(*(column.to_pylist() for column in head.columns), strict=True)]
        rows += batch.num_rows
    cells = [reader.schema.names, *([_cell(value) for value in row] for row in shown)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(reader.schema))]
    right = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in reader.schema]

    def line(row: list[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    lines = [line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])]
    more = f", the first {most_rows:,} shown; --output FILE.csv or FILE.parquet keeps all" if rows > most_rows else ""
    return "\n".join([*lines, f"{rows:,} rows{more}"])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _only_select(sql: str) -> str:
    """Returns the query without its semicolon; raises InputError unless it is a single SELECT."""
    import duckdb

    with _one_line():
        statements = duckdb.extract_statements(sql)
    if len(statements) != 1:
        raise InputError(f"the SQL holds {len(statements)} statements; pass one SELECT")
    if (kind := statements[0].type) != duckdb.StatementType.SELECT:
        raise InputError(f"the SQL is a statement of type {kind.name}; only one that reads is run: pass a SELECT")
    return statements[0].query.strip().rstrip(";")


@contextmanager
def _one_line() -> Iterator[None]:
    """Raises an error of DuckDB as a one-line InputError."""
    import duckdb

    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        text = " ".join(re.split(r"\n\s*LINE \d+:", str(error))[0].split())
        raise InputError(
            f"the SQL cannot be run: {text[:400]}; fix it{_TABLES * ('Table with name' in text)}"
        ) from error


@contextmanager
def _database(uri: str, table: str, scans: _Scans) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Opens DuckDB with access to the table and its rejects only."""
    import duckdb

    vectors, rejects = open_existing(uri, table), open_dataset(table_path(uri, f"{table}_rejects"))
    with ExitStack() as held, _one_line():
        database = held.enter_context(duckdb.connect(":memory:", config=_SETTINGS))
        for name, dataset in ((table, vectors), (f"{table}_rejects", rejects)):
            if dataset is not None:
                database.register(name, _for_duckdb(dataset, name, scans))
                held.callback(database.unregister, name)
        database.execute("SET lock_configuration = true")
        yield database


@contextmanager
def _run(sql: str, uri: str, table: str, scans: _Scans) -> Iterator[pa.RecordBatchReader]:
    select = _only_select(sql)
    with _database(uri, table, scans) as database:
        tree = json.loads(database.execute("SELECT json_serialize_sql(?)", [select]).fetchall()[0][0])
        bounds = _lance_bounds(_bounds_on(tree, table), open_existing(uri, table).schema)
        scans.bounds = {} if bounds is None else {table: bounds}
        reader = database.sql(select).to_arrow_reader(_BATCH_ROWS)
        with closing(reader):
            yield reader


def _nodes(tree: Any) -> Iterator[dict]:
    """Yields every node of DuckDB's syntax tree."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def _bounds_on(tree: dict, table: str) -> list[tuple[str, str, float]]:
    """Returns column, side and number of each bound on all rows of the table, if it is all that the query reads."""
    read = [node for node in _nodes(tree) if node.get("type") in ("BASE_TABLE", "TABLE_FUNCTION")]
    named = [name for node in _nodes(tree) for name in node.get("cte_map", {}).get("map", ())]
    if len(read) != 1 or named or read[0].get("table_name", "").lower() != table.lower():
        return []
    if read[0]["sample"] or read[0]["column_name_alias"]:  # sampled before the condition, or renamed
        return []
    found = [node["where_clause"] for node in _nodes(tree) if node.get("from_table") is read[0]]
    bounds = [bound for where in found if where for condition in _conjuncts(where) for bound in _bounds_in(condition)]
    of_table = ([], [(read[0]["alias"] or table).lower()])  # and not of a struct
    return [
        (names[-1].lower(), side, number) for names, side, number in bounds if [*map(str.lower, names[:-1])] in of_table
    ]


def _conjuncts(condition: dict) -> Iterator[dict]:
    if condition["type"] != "CONJUNCTION_AND":
        yield condition
        return
    for part in condition["children"]:
        yield from _conjuncts(part)


def _bounds_in(condition: dict) -> Iterator[tuple[list[str], str, float]]:
    """Yields the column's dotted name, side and number of a comparison with a literal."""
    kind = condition["type"]
    if kind == "COMPARE_BETWEEN":
        sides = [(condition["input"], ">", condition["lower"]), (condition["input"], "<", condition["upper"])]
    elif kind in _COMPARISONS:
        left, side, right = condition["left"], _COMPARISONS[kind], condition["right"]
        sides = [(left, side, right), (right, _MIRRORED[side], left)]
    else:
        return
    for column, side, number in sides:
        literal = number.get("literal", {})
        if column["type"] == "COLUMN_REF" and literal.get("kind") in ("INTEGER", "NUMERIC"):
            yield column["column_names"], side, float(literal["text"])


def _lance_bounds(given: Iterable[tuple[str, str, float]], schema: pa.Schema) -> "pc.Expression | None":
    """Returns the bounds on floating-point columns, which DuckDB does not push down, as a filter for Lance.

    DuckDB keeps lower bounds because it sorts NaN above all numbers, while Lance sorts NaN with its sign bit set below
    all. DuckDB checks the conditions again, so Lance may return too many rows but never too few.
    """
    bounds: dict[str, dict[str, float]] = {}
    floating = {field.name.lower(): field.name for field in schema if pa.types.is_floating(field.type)}
    for name, side, number in given:
        if name in floating:  # of two lower bounds, either one returns enough rows
            bounds.setdefault(floating[name], {})[side] = number
    kept = None
    for name, bound in bounds.items():
        column, kind = pc.field(name), schema.field(name).type
        tests = [column >= pa.scalar(bound[">"], kind)] if ">" in bound else []
        if "<" in bound:
            tests.append(column <= pa.scalar(bound["<"], kind))
        else:
            tests[0] = tests[0] | (column < pa.scalar(float("-inf"), kind))
        for test in tests:
            kept = test if kept is None else kept & test
    return kept


def _no_nan(filter: "pc.Expression | None", schema: pa.Schema) -> "list[pc.Expression]":
    """Returns filters that exclude NaN with its sign bit set, which Lance sorts below the upper bounds in `filter`."""
    numbers = [field for field in schema if pa.types.is_floating(field.type)]
    bounded = [field for field in numbers if re.search(rf"\({re.escape(field.name)} <=? ", str(filter))]
    return [pc.field(field.name) >= pa.scalar(float("-inf"), field.type) for field in bounded]


def _for_duckdb(dataset: "lance.LanceDataset", name: str, scans: _Scans) -> "lance.LanceDataset":
    """Wraps a table for DuckDB: half floats become float32, `scans.bounds` is applied and the plans are recorded."""
    import lance
    import pyarrow.dataset as pads

    shown = pa.schema([f.with_type(_wide(f.type)) for f in dataset.schema], dataset.schema.metadata)
    narrow = {f.name for f in dataset.schema if _wide(f.type) != f.type}

    class Table(lance.LanceDataset):
        @property
        def schema(self) -> pa.Schema:
            return shown

        def scanner(self, columns: Any = None, filter: Any = None, **options: Any) -> Any:
            bounds = scans.bounds.get(name)
            both = None
            for part in (filter, bounds, *_no_nan(filter, shown)):
                both = part if both is None else both if part is None else both & part
            wanted, left = list(columns or shown.names), None
            try:
                scanner = super().scanner(columns=wanted, filter=both, **options)
                scans.plans.append(scanner.explain_plan())
            except (ValueError, NotImplementedError):
                # A type that Lance cannot filter, such as uint64. DuckDB does not check again what it pushed down.
                read, left = [c for c in shown.names if c in wanted or c in str(filter)], filter
                scanner = super().scanner(columns=read, **options)
                scans.plans.append(scanner.explain_plan())
            if left is None and not narrow & set(wanted):
                return scanner
            schema = pa.schema([shown.field(column) for column in scanner.projected_schema.names])
            batches = (batch.cast(schema) for batch in scanner.to_batches())
            return pads.Scanner.from_batches(batches, schema=schema, columns=wanted, filter=left)

    return Table(dataset.uri, version=dataset.version)


def _wide(kind: pa.DataType) -> pa.DataType:
    """Replaces half floats in a type by float32."""
    if pa.types.is_float16(kind):
        return pa.float32()
    if isinstance(kind, pa.FixedSizeListType) and pa.types.is_float16(kind.value_type):
        return pa.list_(pa.float32(), kind.list_size)
    return kind


def _write_parquet(reader: pa.RecordBatchReader, path: Path) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def _write_csv(reader: pa.RecordBatchReader, path: Path) -> int:
    import pyarrow.csv as csv

    nested = [pa.types.is_nested(f.type) for f in reader.schema]
    schema = pa.schema([f.with_type(pa.string()) if n else f for f, n in zip(reader.schema, nested, strict=True)])
    rows = 0
    with csv.CSVWriter(path, schema) as writer:
        for batch in reader:
            columns = [_as_json(c) if n else c for c, n in zip(batch.columns, nested, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            rows += batch.num_rows
    return rows


def _as_json(column: pa.Array) -> pa.Array:
    texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return pa.array(texts, pa.string())
