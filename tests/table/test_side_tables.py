"""Side tables: what a file says is what is read, or one line names the file and the line that is wrong."""

import bz2
import csv
import gzip
import io
import lzma
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError
from bioscan_jax.table import side_tables
from bioscan_jax.table.side_tables import NULL_WORDS, read_side_table


@pytest.fixture
def read(tmp_path):
    """Returns a function that writes bytes or text to a file and reads it as a side table."""

    def read(data, name="m.csv", **settings):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_side_table(SideTableConfig(path=str(tmp_path / name), **settings), "--metadata")

    return read


def types(side):
    return {field.name: str(field.type) for field in side.table.schema}


def refusal(read, data, name="m.csv", **settings):
    with pytest.raises(InputError) as error:
        read(data, name, **settings)
    message = str(error.value)
    assert name in message
    assert message.isprintable()
    assert len(message) <= 400
    return message


@pytest.mark.parametrize("name", ["m.tsv", "occurrence.txt", "m.csv"])
def test_a_quote_in_a_tab_separated_file_is_text(read, name):
    sites = ['"Old mill' if i in (10, 40) else f"site {i}" for i in range(60)]
    rows = [f"s{i}\tc\t{site}\t{i}" for i, site in enumerate(sites)]
    side = read("\n".join(["sequence_id\tcollector\tsite\tdepth", *rows]) + "\n", name)
    assert side.table["sequence_id"].to_pylist() == [f"s{i}" for i in range(60)]
    assert side.table["site"].to_pylist()[10] == side.table["site"].to_pylist()[40] == '"Old mill'
    assert side.table["depth"].to_pylist() == list(range(60))
    assert "2 cells begin with a quote, which is kept" in side.notes[0]


def test_a_tab_separated_file_whose_header_is_quoted_is_quoted(read):
    side = read('"sequence_id"\t"site"\n"s1"\t"a ""mill"""\n"s2"\t"two\nlines"\n', "m.tsv")
    assert side.table["site"].to_pylist() == ['a "mill"', "two\nlines"]


@pytest.mark.parametrize("quote_line", [2, 7, 31])
@pytest.mark.parametrize("stray", ['"Old mill', '"', '"a" b'])
def test_an_unbalanced_quote_in_csv_names_its_line(read, quote_line, stray):
    lines = ["sequence_id,site,depth", *(f"s{i},site {i},{i}" for i in range(2, 40))]
    lines[quote_line - 1] = f"s,{stray},1"
    assert f"line {quote_line}: a cell that begins with a quote" in refusal(read, "\n".join(lines))
    assert read("\n".join(lines), quoting="none").table["site"][quote_line - 2].as_py() == stray


def test_two_stray_quotes_that_make_one_legal_cell_are_noticed(read):
    """The first opens and the second closes: by RFC 4180 the rows between are text of one cell."""
    data = 'sequence_id,site,depth\ns1,"Old,1\ns2,mid,2\ns3,mill",3\ns4,x,4\n'
    assert "line 2: a quoted cell holds a line break and 3 lines that look like rows" in refusal(read, data)
    assert len(read(data, quoting="double").table) == 2
    assert len(read(data, quoting="none").table) == 4
    legal = 'sequence_id,site,depth\ns1,"Old mill,\nby the sea",3\ns2,"5"" pipe",4\ns3,5" pipe,5\n'
    assert read(legal).table["site"].to_pylist() == ["Old mill,\nby the sea", '5" pipe', '5" pipe']


@pytest.mark.parametrize("line", [3, 11])
def test_a_line_break_in_an_unquoted_file_names_its_line(read, line):
    lines = ["sequence_id\tsite\tdepth", *(f"s{i}\tsite\t{i}" for i in range(2, 20))]
    lines[line - 1] = "s\tOld\nmill\t3"
    assert f"line {line}: 2 cells, but the header has 3" in refusal(read, "\n".join(lines), "m.tsv")
    lines[line - 1] = "s\t3"
    assert f"line {line + 3}: 2 cells" in refusal(read, "\n\n\n" + "\n".join(lines), "m.tsv")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("offset", range(-2, 4))
def test_a_quoted_line_break_at_the_end_of_arrow_s_block(read, offset, ending):
    head = f"sequence_id,site,depth{ending}"
    rows, size = [], len(head)
    while size < 2**20 - 100:
        rows.append((f"s{len(rows)}", "x" * 40, "7"))
        size += len(",".join(rows[-1])) + len(ending)
    before = len('broken,"')
    rows.append(("broken", "y" * (2**20 - size - before - offset) + f"{ending}made up,1,2{ending}tail", "8"))
    rows += [(f"t{i}", "z", "9") for i in range(1000)]
    data = head + "".join(f'{a},"{b}",{c}{ending}' if a == "broken" else f"{a},{b},{c}{ending}" for a, b, c in rows)
    table = read(data).table
    assert table["sequence_id"].to_pylist() == [row[0] for row in rows]
    assert table["site"].to_pylist() == [row[1] for row in rows]


@pytest.mark.parametrize("returns", [1, 2, 3])
@pytest.mark.parametrize("offset", range(-2, 3))
def test_a_carriage_return_in_quotes_at_the_end_of_a_block_keeps_its_line_feed(read, monkeypatch, offset, returns):
    """Arrow skips a line feed at the start of a block after a carriage return."""
    monkeypatch.setattr(side_tables, "_LONGEST_ROW_BYTES", 100)
    start = len('sequence_id,site,depth\ns1,"')
    cell = "x" * (100 - start - 1 - offset) + "\r" * returns + "\n made up"
    table = read(f'sequence_id,site,depth\ns1,"{cell}",2\ns2,y,3\n', quoting="double").table
    assert table.to_pydict() == {"sequence_id": ["s1", "s2"], "site": [cell, "y"], "depth": [2, 3]}


def test_words_for_null_stay_text_in_text_and_are_counted_in_numbers(read):
    data = "sequence_id,country,plot,all,depth,mixed\na,NA,NaN,NA,NA,1\nb,ZA,null,NA,5,x\nc,,A1,NA,NaN,NA\nd,BW,,NA,,\n"
    side = read(data)
    assert side.table["country"].to_pylist() == ["NA", "ZA", None, "BW"]
    assert side.table["plot"].to_pylist() == ["NaN", "null", "A1", None]
    assert side.table["all"].to_pylist() == ["NA"] * 4
    assert side.table["depth"].to_pylist() == [None, 5, None, None]
    assert side.table["mixed"].to_pylist() == ["1", "x", "NA", None]
    assert side.column_notes == {"depth": "2 cells NA, NaN counted as null"}


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["0002", "0010"], "string"),
        (["1", "02"], "string"),
        (["-01.5", "2"], "string"),
        (["1E5", "2"], "string"),
        (["+1", "2"], "string"),
        (["1", "12345678901234567890"], "string"),
        (["0.1234567890123456789", "2"], "string"),
        (["1e+999", "2"], "string"),
        (["2019-05-03", "2019-05-04"], "string"),
        (["true", "false"], "string"),
        (["1 ", "2"], "string"),
        (["1", "2"], "int64"),
        (["0", "-7"], "int64"),
        (["123456789012345678", "2"], "int64"),
        (["0.5", "2"], "double"),
        (["1e-05", "-0"], "double"),
        (["12.5", ".5"], "double"),
        (["1,5", "2"], "string"),
    ],
)
def test_only_plain_numbers_become_numbers(read, cells, kind):
    side = read("sequence_id\tx\n" + "".join(f"s{i}\t{cell}\n" for i, cell in enumerate(cells)))
    assert types(side)["x"] == kind
    if kind == "string":
        assert side.table["x"].to_pylist() == cells
    else:
        number = int if kind == "int64" else float
        assert side.table["x"].to_pylist() == [number(cell) for cell in cells]


def test_semicolons_and_decimal_commas(read):
    data = "\N{BOM}sequence_id;lat;elevation;code;text\r\na;-22,500;0;0,5;1.000,5\r\nb;17,025;10;00,5;2\r\n"
    side = read(data.encode())
    assert types(side) == {
        "sequence_id": "string",
        "lat": "double",
        "elevation": "int64",
        "code": "string",
        "text": "string",
    }
    assert side.table["lat"].to_pylist() == [-22.5, 17.025]
    assert side.table["code"].to_pylist() == ["0,5", "00,5"]
    assert side.column_notes["lat"] == "decimal commas"
    assert "delimited by semicolon" in side.how


@pytest.mark.parametrize(
    ("encode", "settings"),
    [
        (lambda text: text.encode("utf-8-sig"), {}),
        (lambda text: text.encode("utf-16"), {}),
        (lambda text: text.encode("utf-32"), {}),
        (lambda text: text.encode("utf-16-le"), {"encoding": "utf-16-le"}),
        (lambda text: text.encode("cp1252"), {"encoding": "cp1252"}),
        (lambda text: gzip.compress(text.encode(), mtime=0), {}),
        (lambda text: bz2.compress(text.encode()), {}),
        (lambda text: lzma.compress(text.encode()), {}),
        (lambda text: pa.compress(text.encode(), "zstd", asbytes=True), {}),
        (lambda text: ("sep=,\r\n" + text).encode(), {}),
        (lambda text: text.replace("\n", "\r\n").encode(), {}),
        (lambda text: text.replace("\n", "\r").encode(), {}),
        (lambda text: text.replace(",", "|").encode(), {}),
        (lambda text: text.replace(",", ":").encode(), {"delimiter": ":"}),
        (lambda text: text.replace(",", "\t").encode(), {"delimiter": "tab"}),
    ],
)
def test_encodings_compression_and_delimiters(read, encode, settings):
    assert read(encode("sequence_id,place,depth\na,Tromsø,5\nb,Kiel,6\n"), **settings).table.to_pydict() == {
        "sequence_id": ["a", "b"],
        "place": ["Tromsø", "Kiel"],
        "depth": [5, 6],
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("sequence_id,place\na,x\nb,Tromsø\n".encode("latin-1"), "line 3: its text is not utf-8 (tried: UTF-8, and"),
        ("sequence_id,place\na,x\n".encode("utf-16-le"), "line 1: a NUL character"),
        (b"sequence_id,place\na,\x00\n", "line 2: a NUL character"),
        (b"id of it\nx\n", "its header has 1 column(s) (delimiters tried: 'tab, comma, semicolon and bar'"),
        (b"", "its header has 0 column(s)"),
        (b"PK\x03\x04xlsx", "a spreadsheet workbook; unpack it, or save the sheet as CSV"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (gzip.compress(b"sequence_id,x\n" * 9, mtime=0)[:-9], "is cut short"),
        (gzip.compress(gzip.compress(b"sequence_id,x\n", mtime=0), mtime=0), "is compressed twice"),
        (b"\x1f\x8b\x08\x00\x1b[31m" * 9, "cannot be read"),
        (b"PAR1", "cannot be read"),
        (b"sequence_id,x\na,1\nb,2,3\n", "line 3: 3 cells, but the header has 2"),
        (b'sequence_id,x\na,"1\n2"\nb\n', "line 4: 1 cells, but the header has 2"),
    ],
)
def test_what_is_not_a_table_is_named_in_one_line(read, data, expected):
    assert expected in refusal(read, data)


def test_flags_that_make_no_sense(read):
    assert "is unknown" in str(pytest.raises(InputError, read, "sequence_id,x\n", encoding="klingon").value)
    assert "pass one character" in str(pytest.raises(InputError, read, "sequence_id,x\n", delimiter="::").value)


def test_rows_and_columns_without_anything_are_left_out_and_counted(read):
    side = read("sequence_id;x;;\na;1;;\n\n;;;\nb;2;;\n")
    assert side.table.to_pydict() == {"sequence_id": ["a", "b"], "x": [1, 2]}
    assert side.notes == (
        "1 rows without any value left out of m.csv",
        "2 columns without name and values left out of m.csv",
    )
    assert side.locate(1).endswith("m.csv line 5")


def test_the_id_column_may_have_another_name(read, tmp_path):
    side = read("a,b\tprocessid\tgbifID\nx\t007\t12\n", "m.tsv", id_column="processid")
    assert side.table.to_pylist() == [{"a,b": "x", "sequence_id": "007", "gbifID": 12}]
    pq.write_table(pa.table({"processid": ["x"], "sequence_id": ["y"]}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="has a column 'processid' and one 'sequence_id'; rename"):
        read_side_table(SideTableConfig(path=str(tmp_path / "m.parquet"), id_column="processid"), "--metadata")
    pq.write_table(pa.table({"processid": [5]}), tmp_path / "m.parquet")
    side = read_side_table(SideTableConfig(path=str(tmp_path / "m.parquet"), id_column="processid"), "--metadata")
    assert side.table.column_names == ["sequence_id"]


def test_folders_are_columns_of_text_unless_numbers(tmp_path):
    for marker, plate, name in [("COI", "0002", "a"), ("16S", "0010", "b")]:
        folder = tmp_path / f"marker_gene={marker}" / f"plate={plate}" / "year=2020"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"sequence_id": [name], "depth": [1.5]}), folder / "part-0.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.md").touch()
    side = read_side_table(SideTableConfig(path=str(tmp_path)), "--metadata")
    assert sorted(side.table.to_pylist(), key=lambda row: row["sequence_id"]) == [
        {"sequence_id": "a", "depth": 1.5, "marker_gene": "COI", "plate": "0002", "year": 2020},
        {"sequence_id": "b", "depth": 1.5, "marker_gene": "16S", "plate": "0010", "year": 2020},
    ]
    assert side.notes == ("not read: notes.md",)
    for path in ("marker_gene=COI", "marker_gene=COI/plate=0002/year=2020/part-0.parquet"):
        (row,) = read_side_table(SideTableConfig(path=str(tmp_path / path)), "--metadata").table.to_pylist()
        assert row == {"sequence_id": "a", "depth": 1.5, "marker_gene": "COI", "plate": "0002", "year": 2020}


def test_folders_of_text_files_are_read_as_one_table(tmp_path):
    for name, cell in [("a", "0001"), ("b", "2"), ("c", "__HIVE_DEFAULT_PARTITION__")]:
        (tmp_path / f"ship={name if name != 'c' else cell}").mkdir()
        path = tmp_path / f"ship={name if name != 'c' else cell}" / "m.csv"
        path.write_text(f"sequence_id,plate,depth\n{name},{cell if name != 'c' else 3},{'NA' if name == 'a' else 1}\n")
    side = read_side_table(SideTableConfig(path=str(tmp_path)), "--metadata")
    rows = {row["sequence_id"]: (row["plate"], row["depth"], row["ship"]) for row in side.table.to_pylist()}
    assert rows == {"a": ("0001", None, "a"), "b": ("2", 1, "b"), "c": ("3", 1, None)}
    (tmp_path / "ship=a" / "m.csv").write_text("sequence_id,ship\na,b\n")
    with pytest.raises(InputError, match="column 'ship' differs from its folder"):
        read_side_table(SideTableConfig(path=str(tmp_path)), "--metadata")


CELL = st.one_of(
    st.sampled_from(
        ["", "NA", "NaN", "null", "007", "0", "-3", "1E5", "1,5", "-22,500", "12.50", "3", "ø×\u00a0", '"']
    ),
    st.text(st.sampled_from(list('ab1.,;|\t"\n\r ø')), max_size=6),
)


@st.composite
def tables(draw):
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=8))
    return [[f"s{i}", *row] for i, row in enumerate(rows)]


def check_equal(table, rows):
    """Compares cell by cell; numbers must be the cell's number, text the cell."""
    assert table["sequence_id"].to_pylist() == [row[0] or None for row in rows]
    for i, name in enumerate(table.column_names[1:], start=1):
        cells, values = [row[i] for row in rows], table[name].to_pylist()
        for cell, value in zip(cells, values, strict=True):
            if pa.types.is_string(table[name].type):
                assert value == (cell or None)
            elif cell in ("", *NULL_WORDS):
                assert value is None
            elif pa.types.is_integer(table[name].type):
                assert str(value) == cell
            else:
                assert value == float(cell.replace(",", "."))
                assert not re.match(r"-?0\d", cell)


@settings(max_examples=250, deadline=None)
@given(
    rows=tables(),
    delimiter=st.sampled_from(",;\t|"),
    ending=st.sampled_from(["\n", "\r\n"]),
    everything=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    stated=st.booleans(),
)
def test_any_table_written_with_quotes_is_read_back(
    rows, delimiter, ending, everything, encoding, stated, tmp_path_factory
):
    names = ["sequence_id", *(f"c{i}" for i in range(1, len(rows[0])))]

    def quoted(cell):  # csv.writer leaves "\r" unquoted
        return '"' + cell.replace('"', '""') + '"' if everything or re.search(rf'["\r\n{delimiter}]', cell) else cell

    text = "".join(delimiter.join(map(quoted, row)) + ending for row in [names, *rows])
    path = tmp_path_factory.mktemp("side") / "t.csv"
    path.write_bytes(text.encode(encoding))
    stated = stated or (delimiter == "\t" and not everything)
    how = "double" if stated else "auto"
    try:
        side = read_side_table(SideTableConfig(path=str(path), quoting=how), "--metadata")
    except InputError as error:
        # Allowed only where a cell's lines could be rows of their own, and only for that row
        assert not stated
        line = int(re.search(r"t\.csv line (\d+): a quoted cell holds a line break", str(error))[1])
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        starts = [1]
        for _ in reader:
            starts.append(reader.line_num + 1)
        row = rows[starts.index(line) - 1]
        parts = delimiter.join(row).split("\n")
        assert len(parts) > 1
        assert all(part.count(delimiter) == len(names) - 1 for part in parts)
        return
    assert side.table.column_names == names
    check_equal(side.table, rows)


@settings(max_examples=200, deadline=None)
@given(rows=tables(), delimiter=st.sampled_from("\t,;|"), ending=st.sampled_from(["\n", "\r\n"]))
def test_any_table_written_without_quotes_is_read_back_or_refused_at_its_line(
    rows, delimiter, ending, tmp_path_factory
):
    names = ["sequence_id", *(f"c{i}" for i in range(1, len(rows[0])))]
    text = ending.join(delimiter.join(row) for row in [names, *rows]) + ending
    path = tmp_path_factory.mktemp("side") / "t.tsv"
    path.write_bytes(text.encode())
    lines = re.split(r"\r\n|\r|\n", text)
    wrong = [i for i, line in enumerate(lines, 1) if line and line.count(delimiter) != len(names) - 1]
    settings = SideTableConfig(path=str(path), quoting="none", delimiter=delimiter)
    if wrong:
        with pytest.raises(InputError, match=rf"t\.tsv line {wrong[0]}: "):
            read_side_table(settings, "--metadata")
        return
    lines = [line for line in lines if line.replace(delimiter, "")]
    check_equal(read_side_table(settings, "--metadata").table, [line.split(delimiter) for line in lines[1:]])


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.lists(st.sampled_from(["a", "b c", "7", ""]), min_size=3, max_size=3), min_size=1, max_size=20),
    where=st.tuples(st.integers(0, 19), st.integers(0, 2)),
    quoted=st.booleans(),
)
def test_one_stray_quote_is_refused_at_its_line(cells, where, quoted, tmp_path_factory):
    row, column = where[0] % len(cells), where[1]
    lines = [",".join(['"x\ny"' if quoted else "x", *line]) for line in cells]
    lines[row] = ",".join(["x", *cells[row][:column], '"' + cells[row][column], *cells[row][column + 1 :]])
    path = tmp_path_factory.mktemp("side") / "t.csv"
    path.write_text("sequence_id,a,b,c\n" + "\n".join(lines) + "\n")
    line = 2 + row + quoted * row
    with pytest.raises(InputError, match=rf"t\.csv line {line}: "):
        read_side_table(SideTableConfig(path=str(path)), "--metadata")


PLAIN, ODD = "abø Z-", 'ab"\r\n ø'
"""Letters of texts in a file without quotes, and in one with them, which get the delimiter, too."""
COLUMNS = {
    "int64": st.integers(-999, 99_999).map(str),
    "double": st.floats(-1e3, 1e3).map("{:.3f}".format),
    "decimal commas": st.floats(-1e3, 1e3).map(lambda number: f"{number:.2f}".replace(".", ",")),
    "leading zeros": st.integers(0, 999).map("{:05}".format),
    "words": st.sampled_from(["NA", "NaN", "null", "BW", "none"]),
}


@st.composite
def written_tables(draw):
    """Draws a table, how it is written, and one damage or none; returns what is needed to write and to judge it."""
    form = draw(st.sampled_from(["TSV", "CSV, all quoted", "CSV, quoted where needed", "CSV, unquoted"]))
    damage = draw(st.sampled_from(["none", "none", "quote", "break", "cells"]))
    delimiter = "\t" if form == "TSV" else draw(st.sampled_from(",;|"))
    quoted = form.startswith("CSV, ") and form != "CSV, unquoted"
    letters = ODD + delimiter if quoted and damage == "none" else PLAIN
    kinds = draw(st.lists(st.sampled_from([*COLUMNS, "text"]), min_size=1, max_size=4))
    kinds = [kind if kind != "decimal commas" or delimiter == ";" else "text" for kind in kinds]
    rows = draw(st.integers(1, 12))

    def cells(kind):
        some = COLUMNS.get(kind, st.text(letters, max_size=9))
        missing = ["", "NA", "NaN"] if kind in ("int64", "double", "decimal commas") else [""]
        return draw(st.lists(some | some | st.sampled_from(missing), min_size=rows, max_size=rows))

    columns = [[f"s{row}" for row in range(rows)], *map(cells, kinds)]
    return form, damage, delimiter, quoted, kinds, [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=2000, deadline=None)
@given(
    table=written_tables(),
    ending=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    place=st.tuples(st.integers(0, 11), st.integers(0, 3)),
    blocks=st.tuples(st.integers(0, 90), st.integers(0, 90)),
)
def test_tables_of_every_form_are_read_back_or_refused_at_the_right_line(
    table, ending, encoding, place, blocks, tmp_path_factory
):
    form, damage, delimiter, quoted, kinds, rows = table
    names = ["sequence_id", *(f"c{i}" for i in range(1, len(kinds) + 1))]
    row, column = place[0] % len(rows), place[1] % len(kinds) + 1
    written = [list(one) for one in rows]
    line = row + 2
    if damage == "quote":
        damage = "quote" if form == "CSV, quoted where needed" else "none"
        written[row][column] = '"' + written[row][column] if damage == "quote" else written[row][column]
    elif damage == "break":
        damage = "break" if form != "CSV, all quoted" else "none"
        written[row][column] = f"x{ending}y" if damage == "break" else written[row][column]
        line += column == len(kinds)
    elif damage == "cells":
        written[row].append("one more")

    def shown(cell):
        special = form == "CSV, quoted where needed" and damage == "none" and re.search(rf'["\r\n{delimiter}]', cell)
        return '"' + cell.replace('"', '""') + '"' if special or form == "CSV, all quoted" else cell

    lines = [delimiter.join(map(shown, one)) + ending for one in [names, *written]]
    path = tmp_path_factory.mktemp("side") / ("t.tsv" if form == "TSV" else "t.csv")
    path.write_bytes("".join(lines).encode(encoding))
    how = "none" if form == "CSV, unquoted" else "double" if quoted and damage == "none" else "auto"
    longest = max(len(one.encode()) for one in lines)
    with pytest.MonkeyPatch.context() as patch:  # so that line breaks are at any place of a block
        patch.setattr(side_tables, "_CHUNK_BYTES", len(lines[0].encode(encoding)) + 8 + blocks[0])
        patch.setattr(side_tables, "_LONGEST_ROW_BYTES", len(lines[0]) + longest + 8 + blocks[1])
        settings = SideTableConfig(path=str(path), quoting=how, delimiter=delimiter if len(kinds) == 1 else "auto")
        if damage != "none":
            with pytest.raises(InputError, match=rf"{path.name} line {line}: "):
                read_side_table(settings, "--metadata")
            return
        side = read_side_table(settings, "--metadata")
    assert side.table.column_names == names
    check_equal(side.table, rows)
    for kind, name, cells in zip(kinds, names[1:], list(zip(*rows, strict=True))[1:], strict=True):
        if kind in ("int64", "double", "decimal commas") and set(cells) - {"", *NULL_WORDS}:
            assert types(side)[name] == ("int64" if kind == "int64" else "double")
        elif set(cells) != {""}:
            assert types(side)[name] == "string" or kind == "text"
