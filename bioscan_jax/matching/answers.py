"""Writes answers as Parquet, TSV, or SINTAX's tab-separated output, which other programs of the field read."""

from pathlib import Path

import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.location import check_output, output_file

ANSWERS = pa.schema(
    [
        pa.field("sequence_id", pa.string(), nullable=False),
        *(pa.field(rank, pa.string()) for rank in RANKS),
        *(pa.field(f"{rank}_confidence", pa.float64()) for rank in RANKS),
        pa.field("nearest_id", pa.string()),
        pa.field("similarity", pa.float32()),
        pa.field("identity", pa.float32()),
        pa.field("overlap", pa.int32()),
        pa.field("coverage", pa.float32()),
        pa.field("strand", pa.string()),
        pa.field("support", pa.int32()),
        pa.field("unnamed", pa.string()),
        pa.field("novelty", pa.float64()),
        pa.field("novel", pa.bool_()),
        pa.field("abstained_at", pa.string()),
    ]
)
"""Columns of the answers, one row per query; of a query without a vector only the id is filled.

`support` counts the distinct sequences with the lowest name among those that voted. `identity`, `overlap` and `coverage`
are those of the nearest reference; see `candidates.Evidence`. `strand` is + where
the query was compared as written, - where its reverse complement was, null if unknown. `unnamed` tells why a query has no
names: `overlap` or `identity` is below its floor. Queries with abundances have a column `size`, too.
"""
DETAILS = (
    pa.field("sequence", pa.string()),
    pa.field("alignment_start", pa.int32()),
    pa.field("alignment", pa.string()),
)
"""Columns that `identify` adds on request, for `report`: the cleaned DNA of each query on the strand that was compared,
where in the nearest reference its alignment begins, and the alignment as a CIGAR (see `alignment.align_cigar`; both null
where the table has no DNA); and `vector`, a list of float32."""


def output_format(output: str, wanted: config.AnswerFormat | None) -> config.AnswerFormat:
    """Returns the format of an output file: the requested one, or that of its suffix.

    Raises:
        InputError: Neither is given, or `check_output` refuses the file.
    """
    ends: dict[str, config.AnswerFormat] = {
        ".parquet": "parquet",
        ".tsv": "tsv",
        ".sintax": "sintax",
        ".zip": "dwca",
    }
    suffix = Path(output).suffix
    if wanted is None and suffix not in ends:
        raise InputError(f"--output {output}: pass FILE.parquet, FILE.tsv, FILE.sintax or FILE.dwca.zip, or --format")
    check_output(output)
    return wanted or ends[suffix]


def write(answers: pa.Table, output: str, form: config.AnswerFormat, *, calibrated: bool = False) -> None:
    """Writes answers or groups to a file, completely or not at all.

    Args:
        answers: Rows to write.
        output: Path of the file.
        form: Format of the file.
        calibrated: For SINTAX: list the names above `abstained_at` as answers.

    Raises:
        InputError: The file cannot be written.
    """
    with output_file(output) as path:
        if form == "parquet":
            import pyarrow.parquet as pq

            pq.write_table(answers, path, compression="zstd")
        elif form == "tsv":
            path.write_text(as_tsv(answers), encoding="utf-8")
        else:
            path.write_text(as_sintax(answers, calibrated=calibrated), encoding="utf-8")


def as_tsv(table: pa.Table) -> str:
    """Returns tab-separated text with a header: null is empty, white space in a text one space, floats six digits."""
    lines = ["\t".join(table.column_names)]
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        lines.append("\t".join(_cell(value) for value in row))
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def as_sintax(answers: pa.Table, *, calibrated: bool) -> str:
    """Returns lines of id, names with confidences, strand and answered names, like `vsearch --sintax --tabbedout`.

    The rank letters are k, p, c, o, f, g, s. An unknown strand is ".". Spaces and separator characters in a name become underscores. The last
    field stops above `abstained_at`; without a calibration it is empty.
    """
    lines = []
    for row in answers.to_pylist():
        names = [(rank, row[rank]) for rank in RANKS if row[rank] is not None]
        scored = ",".join(f"{rank[0]}:{_plain(name)}({row[f'{rank}_confidence']:.4f})" for rank, name in names)
        stop = row["abstained_at"]
        sure = RANKS if stop is None else RANKS[: RANKS.index(stop)]
        kept = ",".join(f"{rank[0]}:{_plain(name)}" for rank, name in names if calibrated and rank in sure)
        lines.append(
            "\t".join([" ".join(row["sequence_id"].split()), scored, (row["strand"] or ".") if names else "", kept])
        )
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    for character in " ,:()\t\n":
        name = name.replace(character, "_")
    return name
