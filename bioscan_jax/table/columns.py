"""The columns of a vector table: our own, and those of the input in types that Lance can store."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import pyarrow as pa

from bioscan_jax.barcodes.schemas import case_clash
from bioscan_jax.errors import InputError

_OWN_COLUMNS = ("vector", "source_row", "_distance")
SEARCH_COLUMNS = ("query", "similarity", "strand")
"""Columns that a search of the table adds to its results."""
CLASH_SUFFIX = "_in_table"
"""Appended in results to a column of the table that is called like one of them."""
_LANCE_COLUMNS = ("_rowid", "_rowaddr", "_rowoffset", "_row_created_at_version", "_row_last_updated_at_version")


def _storable(given: pa.DataType) -> pa.DataType | None:
    """Returns the type in which Lance stores a column without altering its values, or None."""
    t = pa.types
    if isinstance(given, pa.BaseExtensionType):  # Lance reformats the text of arrow.json
        return _storable(given.storage_type)
    if isinstance(given, pa.DictionaryType):  # the dictionary may differ between blocks
        return _storable(given.value_type)
    if t.is_string_view(given) or t.is_binary_view(given):
        return pa.string() if t.is_string_view(given) else pa.binary()
    if isinstance(given, pa.Decimal32Type | pa.Decimal64Type):
        return pa.decimal128(given.precision, given.scale)
    if isinstance(given, pa.StructType):
        fields = [(f.name, _storable(f.type), f.nullable) for f in given]
        kept = [pa.field(name, type_, nullable) for name, type_, nullable in fields if type_ is not None]
        return pa.struct(kept) if kept and len(kept) == len(fields) else None
    if isinstance(given, pa.MapType):
        key, item = _storable(given.key_type), _storable(given.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if isinstance(given, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        item = _storable(given.value_type)
        if item is None:
            return None
        field = pa.field(given.value_field.name, item, given.value_field.nullable)
        if isinstance(given, pa.FixedSizeListType) and given.list_size and t.is_primitive(item):
            return pa.list_(field, given.list_size)  # Lance panics on fixed-size lists of text
        return pa.large_list(field) if isinstance(given, pa.LargeListType) else pa.list_(field)
    refused = (t.is_list_view, t.is_large_list_view, t.is_interval, t.is_union, t.is_run_end_encoded)
    return None if any(test(given) for test in refused) else given


def vector_schema(source_schema: pa.Schema, hidden_size: int, vector_dtype: Literal["float32", "float16"]) -> pa.Schema:
    """Returns the schema of a vector table: `sequence_id`, `source_row`, `vector`, then the input's other columns.

    A type that Lance refuses or alters is stored as its plain equivalent: a dictionary as its values, an extension
    type as its storage, a view as string or binary, a small decimal as decimal128, a fixed-size list of anything but
    numbers as a list. The input's schema metadata is dropped.

    Args:
        source_schema: Columns to pass through; one called `sequence_id` becomes the id.
        hidden_size: Length of a vector.
        vector_dtype: Type of the vector's elements.

    Raises:
        InputError: A column has a reserved name or a type that cannot be stored, or two names differ only in case.
    """
    item = {"float32": pa.float32(), "float16": pa.float16()}[vector_dtype]
    fields = [
        pa.field("sequence_id", pa.string(), nullable=False),
        pa.field("source_row", pa.uint64(), nullable=False),
        pa.field("vector", pa.list_(item, hidden_size), nullable=False),
    ]
    times = Counter(source_schema.names)
    for field in source_schema:
        name, stored = field.name, _storable(field.type)
        if times[name] > 1:
            raise InputError(f"the input has {times[name]} columns named {name!r}; rename all but one")
        if name in _OWN_COLUMNS:
            raise InputError(f"input column {name!r} has a name that the vector table needs; rename it")
        if name in _LANCE_COLUMNS or not name or "." in name or "`" in name:
            raise InputError(f"input column {name!r} has a name that Lance cannot store; rename it (no '.' or '`')")
        if stored is None:
            raise InputError(f"input column {name!r} has type {field.type}, which Lance cannot store; cast or drop it")
        if name != "sequence_id":
            fields.append(pa.field(name, stored))
    if clash := case_clash(field.name for field in fields):
        raise InputError(
            f"the columns {clash[0]!r} and {clash[1]!r} differ only in case, and SQL cannot tell them apart; rename one "
            "in the input"
        )
    return pa.schema(fields)


def check_values(table: pa.Table, locate: Callable[[int], str]) -> None:
    """Checks that values fit their types: Lance stores text that is not UTF-8, but then cannot read it.

    Args:
        table: Rows of the input.
        locate: Names the file and row that a row of `table` came from, for the message.

    Raises:
        InputError: A value does not; the message names the first.
    """
    if _fault(table) is None:
        return
    for name in table.column_names:
        column, first = table[name], 0
        while (fault := _fault(column)) is not None and len(column) > 1:
            half = len(column) // 2
            wrong = _fault(column.slice(0, half)) is not None
            column, first = column.slice(0, half) if wrong else column.slice(half), first + half * (not wrong)
        if fault is not None:
            raise InputError(
                f"{locate(first)} (counted from 0), column {name!r}: {fault}; write the file with UTF-8 text"
            )


def _fault(values: pa.Table | pa.ChunkedArray) -> str | None:
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        return " ".join(str(error).rsplit("Invalid: ", 1)[-1].split())
    return None
