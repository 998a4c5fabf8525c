"""Writes reference sequences as Parquet with labels: tables of text, and FASTA whose headers hold lineages."""

import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.barcodes.aliases import find_column, find_roles
from bioscan_jax.barcodes.dialects import read_dialect
from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, format_lineage
from bioscan_jax.config import DataConfig, SideTableConfig
from bioscan_jax.data.files import find_files, is_text_table
from bioscan_jax.data.parquet import open_source
from bioscan_jax.errors import InputError, printable, shown
from bioscan_jax.location import check_output, output_file
from bioscan_jax.table.side_tables import read_side_table

_SURVEYED = 1000
"""Records whose headers decide where the lineages are."""
_ID = "sequence_id"


def write_parquet(table: SideTableConfig, output: str, sequence_column: str | None = None) -> list[str]:
    r"""Writes a table of text, or FASTA whose headers hold lineages, as Parquet that every command reads.

    Text is read by the rules of `bioscan_jax.table.side_tables`. Of FASTA, the columns are `sequence_id`, `description`,
    `dna_sequence` and `taxonomy`, the lineage as "K;P;C;O;F;G;S", which is read from the description, or else from the
    whole header; null where it is in no dialect of `bioscan_jax.barcodes.dialects`.

    Args:
        table: The file, and how its text is written.
        output: FILE.parquet.
        sequence_column: Column with the DNA of a table of text, where its name is not a known one.

    Returns:
        Lines on what was read, and how.

    Raises:
        InputError: It cannot be read, has no DNA, or, of FASTA, most headers have no lineage; no file is written then.

    Example:
        >>> _ = Path("unite.fasta").write_text(">A1|k__Fungi;p__Ascomycota;g__Epichloe;s__Epichloe_typhina\nACGTTGCA\n")
        >>> print(write_parquet(SideTableConfig(path="unite.fasta"), "unite.parquet")[1])
        taxonomy: read from the headers (UNITE); 1 of 1 rows
        >>> pq.read_table("unite.parquet")["taxonomy"][0].as_py()
        'Fungi;Ascomycota;;;;Epichloe;Epichloe typhina'
    """
    if not output.endswith(".parquet"):
        raise InputError(f"--output {output}: pass FILE.parquet")
    check_output(output, inputs=[table.path])
    rows, notes = _of_text(table, sequence_column) if _is_text(table.path) else _of_fasta(table.path)
    with output_file(output) as path:
        pq.write_table(rows, path, compression="zstd")
    return [f"{output}: {rows.num_rows:,} rows", *notes]


def _is_text(path: str) -> bool:
    """Returns whether a file is a table of text, and not FASTA."""
    if is_text_table(path) or not Path(path).is_file():
        return is_text_table(path)
    try:
        return find_files(path).kind == "parquet"
    except InputError:  # it neither has the name of FASTA nor begins as FASTA does
        return True


def _of_text(given: SideTableConfig, sequence_column: str | None) -> tuple[pa.Table, list[str]]:
    side = read_side_table(given, "--table")
    table, names = side.table, side.table.column_names
    if not side.is_text:
        raise InputError(f"--table {given.path} is Parquet already; bioscan describe tells how it is read")
    if again := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(
            f"--table {given.path} has {names.count(again)} columns named {shown(again)}; rename all but one"
        )
    found = find_column("sequence", names) if sequence_column is None else sequence_column
    if found is None or found not in names:
        lacks = "of DNA under a known name" if sequence_column is None else shown(sequence_column)
        raise InputError(
            f"--table {given.path} has no column {lacks}: pass --sequence_column COLUMN, or give it a name such as "
            f"'sequence', and turn a table around whose columns are named by sequences; the columns are {shown(names, 400)}"
        )
    roles = find_roles(names) | {"sequence": found}
    notes = [
        f"read as {side.how}",
        "understood as " + ", ".join(f"{role} = {name}" for role, name in roles.items()),
        *(f"{name}: {note}" for name, note in side.column_notes.items()),
        *side.notes,
    ]
    if "id" not in roles:
        notes.append("no column is known to hold ids: they become file and row, unless --data.id_column names one")
    if sequence_column is not None:
        notes.append(f"later commands need --data.sequence_column {sequence_column}")
    return table, [printable(note) for note in notes]


def _of_fasta(path: str) -> tuple[pa.Table, list[str]]:
    with tempfile.TemporaryDirectory(prefix="bioscan_jax-") as scratch:
        source = open_source(DataConfig(path=path), scratch=Path(scratch))
        table = pa.concat_tables([source[index].table for index in range(len(source))])
    ids = table[_ID].to_pylist()
    described = [text or "" for text in table["description"].to_pylist()]
    headers = [f"{key} {text}".strip() for key, text in zip(ids, described, strict=True)]
    places = {"descriptions": described, "headers": headers}
    where = next((where for where, texts in places.items() if _mostly_read(texts[:_SURVEYED])), None)
    if where is None:
        raise InputError(
            f"--table {path}: most headers hold no lineage that can be read, such as {headers[0][:100]!r}; known are "
            "those of UNITE, SILVA, PR2, MIDORI2, GTDB, QIIME and SINTAX. Pass a table with names and DNA, such as "
            "BOLD's TSV"
        )
    read = [_names(text) for text in places[where]]
    dialects = Counter(name[1] for name in read if name is not None)
    lineages = [None if names is None else format_lineage(names[0]) for names in read]
    known = len(lineages) - lineages.count(None)
    notes = [f"{LINEAGE_COLUMN}: read from the {where} ({', '.join(dialects)}); {known:,} of {len(lineages):,} rows"]
    if known < len(lineages):
        notes.append(f"no lineage can be read from the others, first {headers[lineages.index(None)][:100]!r}")
    column = pa.array(lineages, pa.string())
    return table.append_column(LINEAGE_COLUMN, column), [printable(note) for note in notes]


def _mostly_read(texts: list[str]) -> bool:
    return 2 * sum(_names(text) is not None for text in texts) > len(texts)


def _names(header: str) -> tuple[tuple[str | None, ...], str] | None:
    """Returns the seven names that a header holds, and their dialect; None if it holds none."""
    found = read_dialect(header)
    return (found[0], found[1].name) if found is not None and any(found[0]) else None
