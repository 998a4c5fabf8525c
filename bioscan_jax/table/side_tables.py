"""Reads tables that arrive beside the barcodes (metadata, true names): CSV, TSV, Parquet, or a directory of them.

The rules, which a run's summary repeats:

- Compression and Parquet are recognised by a file's first bytes, not by its name.
- The encoding is that of a byte order mark, else UTF-8. Nothing else is guessed.
- The delimiter is the one of tab, comma, semicolon and bar that splits the header so that one cell is the id column,
  or else into most cells. A first line `sep=;`, as Excel writes it, decides and is skipped.
- Cells are quoted as in RFC 4180 (a quote within doubled), except in tab-separated files, which GBIF, BOLD and ENA
  write without quoting: there a quote is a character as any other, unless every cell of the header is quoted.
- An empty cell is null. A column whose other cells are all numbers is int64 or float64, and there NA, NaN, null and the
  like are null too, and counted. All other columns are text as the file has it: a leading zero, an exponent without a
  sign (1E5), more than 17 digits, dates and true/false make text. In a file delimited by semicolons, numbers may have
  decimal commas.
- A directory `name=value` in the path of a file is a column, as in `data.files.key_value_folders`.

Arrow reads the cells. It accepts unbalanced quotes and names rows in place of lines, so quotes are checked here first,
and Python's csv module finds the line of a mistake.
"""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from bioscan_jax.config import SideTableConfig
from bioscan_jax.data.files import key_value_folders
from bioscan_jax.errors import InputError, one_line, shown
from bioscan_jax.location import local_copy

ID = "sequence_id"
NULL_WORDS = ("NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None")
"""Cells that are null in a column of numbers."""

_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "bar": "|"}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "a spreadsheet workbook; save the sheet as CSV",
    b"version https://git-lfs": "a Git LFS pointer, not the table; run `git lfs pull`",
    b"%PDF": "a PDF; pass the table as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
}
_CHUNK_BYTES = 1 << 20
_LONGEST_ROW_BYTES = 16 << 20
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_NUMBER = r"^-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-][0-9]+)?$"
_COMMA_NUMBER = r"^-?(0|[1-9][0-9]*)(,[0-9]+)?$"
_MOST_DIGITS = 17  # all that a float64 holds
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


@dataclass(frozen=True, kw_only=True, eq=False)
class SideTable:
    """A side table in memory, and how it was read."""

    table: pa.Table
    how: str
    """Format, delimiter, quoting and encoding, for summaries."""
    locate: Callable[[int], str]
    """Names the file and line, or row, that a row of `table` came from."""
    column_notes: Mapping[str, str] = field(default_factory=dict)
    """How cells of a column became nulls or numbers, where that is not evident."""
    notes: tuple[str, ...] = ()
    """What was left out of the files."""
    is_text: bool = True
    """Whether its cells were text."""


def read_side_table(given: SideTableConfig, flag: str, types: Mapping[str, pa.DataType] | None = None) -> SideTable:
    """Reads a side table by the rules of this module.

    Args:
        given: The file or directory, and what is known about its text.
        flag: The flag that names it, for messages.
        types: Types that columns of text files must have; those of the other columns are inferred.

    Raises:
        InputError: It cannot be read, a quote is unbalanced, a row has more or fewer cells than the header, or a value
            is not of its column's type. The message names the file and line.
    """
    path = local_copy(given.path, flag.removeprefix("--")).absolute()
    where = f"{flag} {given.path}"
    if path.is_dir():
        return _read_directory(path, given, flag, types or {})
    if path.is_file() and key_value_folders(str(path), str(path.parent)):
        return _read_files([path], path.parent, [], given, flag, types or {})
    if not path.is_file():
        raise InputError(f"{where}: there is no such file; pass a Parquet, CSV or TSV file, or a directory of them")
    with _readable(where):
        if _is_parquet(path):
            return SideTable(
                table=_read_parquet(path, given, where),
                how="Parquet",
                is_text=False,
                locate=lambda row: f"{where} row {row} (counted from 0)",
            )
        text = _inspect(path, given, where, flag)
        table, notes = _read_text(text)
        typed, column_notes = _typed(table, types or {}, text.delimiter == ";", text.locate)
    return SideTable(table=typed, how=text.how, locate=text.locate, column_notes=column_notes, notes=notes)


def _read_directory(root: Path, given: SideTableConfig, flag: str, types: Mapping[str, pa.DataType]) -> SideTable:
    where = f"{flag} {given.path}"
    files, left_out = [], []
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:
            names = path.name.lower().removesuffix(path.suffix.lower() if path.suffix.lower() in _COMPRESSED else "")
            (files if names.endswith(_SUFFIXES) else left_out).append(path)
    if not files:
        raise InputError(f"{where}: no file below it ends in {', '.join(_SUFFIXES)}; pass a directory of such files")
    return _read_files(files, root, left_out, given, flag, types)


def _read_files(
    files: Sequence[Path],
    root: Path,
    left_out: Sequence[Path],
    given: SideTableConfig,
    flag: str,
    types: Mapping[str, pa.DataType],
) -> SideTable:
    """Reads files as one table, with a column for each of their `key=value` folders."""
    where = f"{flag} {given.path}"
    parts, notes, locators, hows, all_semicolon = [], [], [], set(), True
    parquet: bool | None = None
    keys: list[str] | None = None
    for path in files:
        here = f"{flag} {path}"
        with _readable(here):
            if parquet not in (None, _is_parquet(path)):
                raise InputError(f"{where} mixes Parquet and text ({path.name}); pass files of one kind")
            if parquet := _is_parquet(path):
                table, locate = _read_parquet(path, given, here), partial("{} row {} (counted from 0)".format, here)
                hows.add("Parquet")
            else:
                text = _inspect(path, given, here, flag)
                table, more = _read_text(text)
                locate, all_semicolon = text.locate, all_semicolon and text.delimiter == ";"
                hows.add(text.how)
                notes += more
        columns = key_value_folders(str(path), str(root))
        if keys not in (None, list(columns)):
            raise InputError(
                f"{here}: its folders name the columns {shown(list(columns))}, others {shown(keys)}; give all the same"
            )
        keys = list(columns)
        parts.append(_with_columns(table, columns, here))
        locators.append((len(table), locate))
    try:
        whole = pa.concat_tables(parts, promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"{where}: its files differ in a column ({one_line(error)}); give all one type") from error

    def locate_in_all(row: int) -> str:
        for rows, locate in locators:
            if row < rows:
                return locate(row)
            row -= rows
        raise IndexError(row)

    text_columns = keys if parquet else whole.column_names
    typed, column_notes = _typed(whole, types, all_semicolon and not parquet, locate_in_all, text_columns)
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        notes.append(f"not read: {', '.join(path.name for path in left_out[:3])}{more}")
    how = f"{len(files):,} files, {' and '.join(sorted(hows))}"
    return SideTable(
        table=typed,
        how=how,
        locate=locate_in_all,
        column_notes=column_notes,
        notes=tuple(notes),
        is_text=not parquet,
    )


def _read_parquet(path: Path, given: SideTableConfig, where: str) -> pa.Table:
    table = pq.ParquetFile(path).read()
    return table.rename_columns(_with_id(table.column_names, given, where))


def _with_id(names: Sequence[str], given: SideTableConfig, where: str) -> list[str]:
    """Returns the names with the id column's as sequence_id."""
    if given.id_column != ID and given.id_column in names and ID in names:
        raise InputError(f"{where} has a column {shown(given.id_column)} and one {ID!r}; rename one of them")
    return [ID if name == given.id_column else name for name in names]


def _with_columns(table: pa.Table, columns: Mapping[str, str | None], where: str) -> pa.Table:
    """Adds the columns of a file's folders; one that the file has too must say the same."""
    for name, value in columns.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
        elif set(table[name].cast(pa.string()).unique().to_pylist()) - {value}:
            raise InputError(f"{where}: column {shown(name)} differs from its folder; rename one of them")
    return table


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Raises the errors of damaged files as InputError."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{where} is cut short (the compressed data ends early); get it again") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{where} cannot be read: {one_line(error)}; get it again or fix it") from error


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"


def _open(path: Path, where: str) -> io.BufferedIOBase | pa.NativeFile:
    """Opens a text file, decompressed."""
    with path.open("rb") as file:
        head = file.read(64)
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise InputError(f"{where} is a spreadsheet workbook; save the sheet as CSV")
    for start, what in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise InputError(f"{where} is {what}")
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"BZh"):
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return pa.input_stream(str(path), compression="zstd")
    return path.open("rb")


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text file and how it is written."""

    path: Path
    where: str
    flag: str
    encoding: str
    delimiter: str
    quoted: bool
    quoting_given: bool
    names: tuple[str, ...]
    """Cells of the header."""
    skipped_lines: int
    """1 if a line `sep=` comes before the header."""

    @property
    def how(self) -> str:
        delimiter = next((word for word, mark in _DELIMITERS.items() if mark == self.delimiter), repr(self.delimiter))
        quoting = "cells quoted" if self.quoted else "cells not quoted"
        return f"text delimited by {delimiter}, {quoting}, {self.encoding.removesuffix('-sig').upper()}"

    def locate(self, row: int) -> str:
        """Names the file and line of a row; reads the file again."""
        records = (line for line, cells in _records(self) if any(cells))
        next(records)
        for number, line in enumerate(records):
            if number == row:
                return f"{self.where} line {line}"
        raise IndexError(row)

    def fail(self, line: int, what: str, fix: str) -> NoReturn:
        raise InputError(f"{self.where} line {line}: {what}; {fix}")


def _inspect(path: Path, given: SideTableConfig, where: str, flag: str) -> _Text:
    """Finds out how a text file is written; raises InputError if it is not a table."""
    with _open(path, where) as stream:
        head = stream.read(512)
    if head[257:262] == b"ustar":
        raise InputError(f"{where} is a tar archive; unpack it and pass the table in it")
    if head.startswith((b"\x1f\x8b", b"PAR1", b"PK\x03\x04")):
        raise InputError(f"{where} is compressed twice, or a compressed archive; unpack it")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{where} is a web page or XML, not a table; download the table itself")
    encoding = given.encoding
    bom = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)
    if encoding == "auto":
        encoding = bom or "utf-8"
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise InputError(
            f"{flag}.encoding {encoding!r} is unknown; pass a name such as utf-8, utf-16 or cp1252"
        ) from None
    encoding = "utf-8-sig" if name == "utf-8" and bom == "utf-8-sig" else encoding
    plain = _Text(
        path=path,
        where=where,
        flag=flag,
        encoding=encoding,
        delimiter=",",
        quoted=True,
        quoting_given=given.quoting != "auto",
        names=(),
        skipped_lines=0,
    )
    start = next(_chunks(plain), b"").decode(errors="ignore")
    if separator := re.match(r'"?sep=(.)"?\r?\n', start):
        start = start[separator.end() :]
    delimiter = _delimiter(given, flag, separator[1] if separator else None, start)
    first_line = start.lstrip("\r\n").splitlines()[:1]
    raw = first_line[0].split(delimiter) if first_line else []
    whole = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in raw)
    quoted = given.quoting == "double" or (given.quoting == "auto" and (delimiter != "\t" or whole))
    names = _header(start, delimiter, quoted)
    if len(names) < 2:
        tried = delimiter if given.delimiter != "auto" else "tab, comma, semicolon and bar"
        raise InputError(
            f"{where}: its header has {len(names)} column(s) (delimiters tried: {tried!r}; encoding: {encoding}); pass "
            f"{flag}.delimiter or {flag}.encoding"
        )
    names = _with_id(names, given, where)
    skipped = int(separator is not None)
    return replace(plain, delimiter=delimiter, quoted=quoted, names=tuple(names), skipped_lines=skipped)


def _delimiter(given: SideTableConfig, flag: str, stated: str | None, start: str) -> str:
    if given.delimiter == "auto":
        if stated:
            return stated
        headers = {mark: _header(start, mark, True) for mark in _DELIMITERS.values()}
        return max(headers, key=lambda mark: (given.id_column in headers[mark], len(headers[mark])))
    mark = {**_DELIMITERS, r"\t": "\t", "space": " "}.get(given.delimiter, given.delimiter)
    if len(mark) != 1 or not mark.isascii() or mark in '"\r\n':
        raise InputError(
            f"{flag}.delimiter {given.delimiter!r}: pass one character, or one of {', '.join(_DELIMITERS)}"
        )
    return mark


def _header(start: str, delimiter: str, quoted: bool) -> list[str]:
    lines = io.StringIO(start, newline="")
    try:
        return next((cells for cells in csv.reader(lines, **_csv_options(delimiter, quoted)) if any(cells)), [])
    except csv.Error:
        return []


def _csv_options(delimiter: str, quoted: bool) -> dict:
    return {
        "delimiter": delimiter,
        "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        "quotechar": '"',
        "strict": True,
    }


def _chunks(text: _Text) -> Iterator[bytes]:
    """Yields the file decompressed, as UTF-8 without a byte order mark or a line `sep=`."""
    decoder = codecs.getincrementaldecoder(text.encoding)("strict")
    line, skip = 1, bool(text.skipped_lines)
    with _open(text.path, text.where) as stream:
        data = b"."
        while data:
            data = stream.read(_CHUNK_BYTES)
            try:
                part = decoder.decode(data, not data)
            except UnicodeError as error:
                if isinstance(error, UnicodeDecodeError):
                    line += error.object[: error.start].count(b"\n")
                tried = (
                    "UTF-8, and UTF-16 or UTF-32 by a byte order mark" if "utf-8" in text.encoding else text.encoding
                )
                fix = f"pass {text.flag}.encoding, such as cp1252 (Windows) or latin-1"
                text.fail(line, f"its text is not {text.encoding} (tried: {tried})", fix)
            if "\0" in part:
                line += part[: part.index("\0")].count("\n")
                fix = f"pass {text.flag}.encoding utf-16 if it is a table, or save it as UTF-8"
                text.fail(line, f"a NUL character, as in UTF-16 or binary data (read as {text.encoding})", fix)
            line += part.count("\n")
            if skip and part:
                part, skip = part[part.index("\n") + 1 :], False
            if part:
                yield part.encode()


class _Stream(io.RawIOBase):
    """A file of an iterator's bytes."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(target), len(self._left))
        target[:size], self._left = self._left[:size], self._left[size:]
        return size


class _ArrowStream(io.BufferedReader):
    """A file whose reads do not end in a carriage return.

    At the start of a block Arrow skips a line feed if the block before ended in a carriage return, inside quotes too.
    """

    def __init__(self, chunks: Iterator[bytes]):
        super().__init__(_Stream(chunks), _CHUNK_BYTES)
        self._returns = b""

    def read(self, size: int | None = -1) -> bytes:
        more = super().read(size if size is None or size < 0 else max(size - len(self._returns), 1))
        data = self._returns + more
        kept = data.rstrip(b"\r") if more else data
        kept = kept or data
        self._returns = data[len(kept) :]
        return kept


def _records(text: _Text) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line and the cells of each row that is not blank, the header's first; slow.

    Raises:
        InputError: A quote is not closed, or text follows the closing one.
    """
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = io.TextIOWrapper(io.BufferedReader(_Stream(_chunks(text))), encoding="utf-8", newline="")
    try:
        reader = csv.reader(lines, **_csv_options(text.delimiter, text.quoted))
        while True:
            line = reader.line_num + 1 + text.skipped_lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fix = f"close or double the quote, or pass {text.flag}.quoting none if quotes are part of the text"
                text.fail(line, f"a cell that begins with a quote does not end with one ({error})", fix)
            if cells:
                yield line, cells
    finally:
        csv.field_size_limit(before)


def _check_rows(text: _Text) -> None:
    """Raises InputError for the first row that is quoted wrongly or has more or fewer cells than the header."""
    for line, cells in _records(text):
        if len(cells) != len(text.names):
            fix = f"join a cell that a line break splits, or pass {text.flag}.delimiter or {text.flag}.quoting "
            fix += "none" if text.quoted else "double"
            text.fail(line, f"{len(cells)} cells, but the header has {len(text.names)} ({text.how})", fix)


def _is_quoted_well(text: _Text) -> bool:
    """Returns whether every quote opens a cell, closes one or is doubled; False for the legal `5" pipe` too."""
    mark, quotes, data = ord(text.delimiter), 0, b"\n"
    for chunk in _with_end(_chunks(text)):
        data += chunk
        values = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(values[1:-1] == _QUOTE) + 1
        opening = (quotes + np.arange(len(places))) % 2 == 0
        neighbours = np.where(opening, values[places - 1], values[places + 1])
        if not np.isin(neighbours, (mark, _NEWLINE, _RETURN, _QUOTE)).all():
            return False
        quotes, data = quotes + len(places), data[-2:]
    return quotes % 2 == 0


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from chunks
    yield b"\n"


def _read_text(text: _Text) -> tuple[pa.Table, tuple[str, ...]]:
    """Reads all cells as text, empty ones as null, without empty rows and empty columns that have no name.

    Returns:
        The table, and what was left out.
    """
    if text.quoted and not _is_quoted_well(text):
        _check_rows(text)
    # Arrow gets numbers for names, as names may repeat
    numbers = [str(i) for i in range(len(text.names))]
    parse = arrow_csv.ParseOptions(
        delimiter=text.delimiter, quote_char='"' if text.quoted else False, newlines_in_values=text.quoted
    )
    read = arrow_csv.ReadOptions(
        column_names=numbers, skip_rows_after_names=1, block_size=_LONGEST_ROW_BYTES, use_threads=False
    )
    convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(numbers, pa.string()), strings_can_be_null=False)
    try:
        table = arrow_csv.open_csv(_ArrowStream(_chunks(text)), read, parse, convert).read_all()
    except pa.ArrowInvalid:
        _check_rows(text)
        raise
    if text.quoted and not text.quoting_given:
        _check_swallowed(text, table)
    columns = [
        pc.call_function("if_else", [pc.call_function("not_equal", [c, ""]), c, pa.scalar(None, c.type)])
        for c in table.columns
    ]
    table = pa.table(columns, names=numbers)
    notes = []
    empty = np.logical_and.reduce([column.is_null().to_numpy() for column in columns])
    if empty.any():
        table = table.filter(pa.array(~empty))
        notes.append(f"{int(empty.sum()):,} rows without any value left out of {text.path.name}")
    nameless = [i for i, name in enumerate(text.names) if not name and columns[i].null_count == len(columns[i])]
    if nameless:
        notes.append(f"{len(nameless)} columns without name and values left out of {text.path.name}")
    if not text.quoted:
        quotes = sum(
            pc.call_function("sum", [pc.call_function("starts_with", [c], pc.MatchSubstringOptions('"'))]).as_py() or 0
            for c in columns
        )
        if quotes:
            notes.append(f"{quotes:,} cells begin with a quote, which is kept ({text.flag}.quoting double removes it)")
    kept = [i for i in range(len(numbers)) if i not in nameless]
    return table.select(kept).rename_columns([text.names[i] for i in kept]), tuple(notes)


def _check_swallowed(text: _Text, table: pa.Table) -> None:
    """Raises InputError for a row whose lines could each be a row of their own: two stray quotes look like that."""
    breaks = [
        c.to_numpy()
        for c in (pc.call_function("match_substring", [c], pc.MatchSubstringOptions("\n")) for c in table.columns)
    ]
    width = len(text.names)
    for row in np.flatnonzero(np.logical_or.reduce(breaks)).tolist():
        lines = text.delimiter.join(table[i][row].as_py() for i in range(width)).split("\n")
        if len(lines) > (1 if width > 2 else 2) and all(line.count(text.delimiter) == width - 1 for line in lines):
            records = (line for line, _ in _records(text))
            line = next(line for number, line in enumerate(records, -1) if number == row)
            fix = f"remove a stray quote, or pass {text.flag}.quoting none, or double if this is meant"
            text.fail(line, f"a quoted cell holds a line break and {len(lines)} lines that look like rows", fix)


def _typed(
    table: pa.Table,
    types: Mapping[str, pa.DataType],
    decimal_commas: bool,
    locate: Callable[[int], str],
    text_columns: Sequence[str] | None = None,
) -> tuple[pa.Table, dict[str, str]]:
    """Turns columns of text into the types that are asked for, or that their cells show."""
    notes: dict[str, str] = {}
    fields, columns = [], []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name != ID and (text_columns is None or name in text_columns):
            wanted = types.get(name)
            inferred, note = _numbers(column, decimal_commas)
            if wanted is None:
                column = inferred
            elif pa.types.is_integer(wanted) or pa.types.is_floating(wanted) or pa.types.is_decimal(wanted):
                column = _cast(name, _without_words(inferred), wanted, locate)
            elif not _is_text(wanted):
                column = _cast(name, column, wanted, locate)
            if note and not _is_text(column.type):
                notes[name] = note
        fields.append(name)
        columns.append(column)
    return pa.table(columns, names=fields), notes


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _cast(name: str, column: pa.ChunkedArray, kind: pa.DataType, locate: Callable[[int], str]) -> pa.ChunkedArray:
    if pa.types.is_null(kind) or pa.types.is_nested(kind):
        return column
    try:
        return column.cast(kind)
    except pa.ArrowException:
        first = 0
        while len(column) > 1:
            half = column.slice(0, len(column) // 2)
            try:
                half.cast(kind)
                column, first = column.slice(len(half)), first + len(half)
            except pa.ArrowException:
                column = half
        raise InputError(
            f"{locate(first)}: column {shown(name)} is {shown(column[0].as_py())}, but the table's type is "
            f"{shown(str(kind))[1:-1]}; fix it or rename the column"
        ) from None


def _numbers(column: pa.ChunkedArray, decimal_commas: bool) -> tuple[pa.ChunkedArray, str | None]:
    """Returns a column as numbers if its cells are, else as it is; and a note on how."""
    values = _without_words(column)
    if values.null_count == len(values):
        return column, None
    note = None
    if count := values.null_count - column.null_count:
        found = pc.call_function("unique", [column.filter(values.is_null())]).drop_null().to_pylist()
        note = f"{count:,} cells {', '.join(found)} counted as null"
    if _all_match(values, _INTEGER):
        return values.cast(pa.int64()), note
    if decimal_commas and _all_match(values, _COMMA_NUMBER):
        note = f"decimal commas{'; ' + note if note else ''}"
        values = pc.call_function("replace_substring", [values], pc.ReplaceSubstringOptions(",", "."))
    elif not _all_match(values, _NUMBER):
        return column, None
    long = values.filter(pc.call_function("greater", [pc.call_function("utf8_length", [values]), _MOST_DIGITS]))
    if any(len(re.sub(r"[eE].*|\D", "", value).lstrip("0")) > _MOST_DIGITS for value in long.to_pylist()):
        return column, None
    numbers = values.cast(pa.float64())
    if pc.call_function("any", [pc.call_function("is_inf", [numbers])]).as_py():
        return column, None
    return numbers, note


def _without_words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Makes the words of NULL_WORDS null in a column of text."""
    if not _is_text(column.type):
        return column
    words = pc.call_function("is_in", [column], pc.SetLookupOptions(pa.array(NULL_WORDS)))
    return pc.call_function("if_else", [words, pa.scalar(None, column.type), column])


def _all_match(values: pa.ChunkedArray, pattern: str) -> bool:
    options = pc.MatchSubstringOptions(pattern)
    for chunk in values.chunks:
        for start in (0, 1000):  # most columns of text fail at once
            part = chunk.slice(start, 1000 if start == 0 else len(chunk))
            if pc.call_function("all", [pc.call_function("match_substring_regex", [part], options)]).as_py() is False:
                return False
    return True
