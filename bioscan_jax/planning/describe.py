"""Describes an input before anything is computed: how its columns are read, and what would be rejected."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc

from bioscan_jax.barcodes.aliases import find_roles
from bioscan_jax.barcodes.cleaning import REASONS, CleaningCounts, clean, foreign_characters
from bioscan_jax.barcodes.dialects import NEEDS_DIALECT, read_dialect
from bioscan_jax.barcodes.lineage import RANKS, LineageSurvey, lineage_columns, rank_columns
from bioscan_jax.barcodes.strands import StrandSurvey, survey_strands
from bioscan_jax.config import DataConfig
from bioscan_jax.data.parquet import ParquetBlocks, hash_text, open_source
from bioscan_jax.errors import InputError, printable
from bioscan_jax.notebook import Shown, facts_html
from bioscan_jax.table.columns import check_values, vector_schema

_HEADERS = 100
_STRAND_ROWS = 4096
"""Most distinct sequences whose strands are compared."""
_ID = "sequence_id"


@dataclass(frozen=True, kw_only=True)
class Description(Shown):
    """What an input holds; prints as lines of text.

    `roles` and `columns` are under the input's own names.
    """

    files: int
    rows: int
    columns: dict[str, str]
    """Arrow type of each column of the table that `embed` would make, vector apart."""
    roles: dict[str, str]
    """Column of each role, such as sequence, id, species, latitude."""
    lineage: str
    """How the lineages are written, or that there are none."""
    ranks: dict[str, int]
    """Rows with a known name at each rank."""
    warnings: list[str]
    """Lines on lineages that cannot be read, and on ranks that are mostly unknown."""
    lengths: tuple[int, ...]
    """Least, lower quartile, median, upper quartile and greatest number of bases of the usable rows."""
    strands: StrandSurvey
    """Of a sample of the distinct sequences, spread over the input."""
    repeated_ids: int
    """Rows whose id an earlier row has; `embed` refuses them."""
    repeated_id: str | None
    """One of these ids."""
    repeated_sequences: int
    """Usable rows whose sequence an earlier row has."""
    changes: CleaningCounts
    characters: dict[str, int]
    """Characters that are not DNA, with their number."""
    rejects: dict[str, int]
    """Rows that would be rejected, by reason."""
    first_rejects: dict[str, str]
    """Place of the first row of each reason."""

    def __str__(self) -> str:
        """Returns the lines for the terminal."""
        return "\n".join(f"{name:>10}  {printable(text)}" for name, text in self._lines().items())

    def _repr_html_(self) -> str:
        return facts_html({name: printable(text) for name, text in self._lines().items()})

    def _lines(self) -> dict[str, str]:
        roles = ", ".join(f"{role} = {column}" for role, column in self.roles.items())
        if "id" not in self.roles:
            roles += "; no column of ids: they are made of file and row"
        other = [f"{name} ({kind})" for name, kind in self.columns.items() if name not in (*self.roles.values(), _ID)]
        changes = self.changes
        least, low, median, high, most = self.lengths
        again = f", such as {self.repeated_id!r}: embed refuses them" if self.repeated_id else ""
        lines = {
            "files": f"{self.files:,}",
            "rows": f"{self.rows:,}",
            "columns": roles,
            "passed on": ", ".join(other) or "none",
            "lineages": self.lineage,
            "ranks": ", ".join(f"{rank} {count:,}" for rank, count in self.ranks.items()) or "none",
            "lengths": f"{least:,} to {most:,} bases, quartiles {low:,}, {median:,}, {high:,}",
            "strands": _strand_line(self.strands),
            "same id": f"{self.repeated_ids:,} rows repeat an earlier id{again}",
            "same DNA": f"{self.repeated_sequences:,} rows repeat an earlier sequence",
            "cleaned": f"{changes.lower_case:,} lower-case, {changes.u_to_t:,} U to T, {changes.ambiguous_to_n:,} "
            f"ambiguous to N, {changes.gaps_removed:,} gaps and {changes.stops_removed:,} final '*' removed (characters)",
            "not DNA": ", ".join(f"{count:,} {letter!r}" for letter, count in self.characters.items()) or "none",
            "rejects": "; ".join(
                f"{count:,} {reason} ({REASONS[reason]}), first {self.first_rejects[reason]}"
                for reason, count in self.rejects.items()
            )
            or "none",
        }
        return lines | {f"warning {number}": text for number, text in enumerate(self.warnings, 1)}


def describe(data: DataConfig) -> Description:
    """Reads an input once, without a model, and tells how `embed` and the others would read it.

    Args:
        data: The barcodes.

    Raises:
        InputError: The input cannot be read.

    Example:
        >>> import pyarrow.parquet as pq
        >>> rows = {"processid": ["A1", "A2"], "nuc": ["ACGT", "AC?T"], "genus": ["Aedes"] * 2}
        >>> pq.write_table(pa.table(rows), "bold.parquet")
        >>> found = describe(DataConfig(path="bold.parquet"))
        >>> found.roles["sequence"], found.roles["id"], found.characters
        ('nuc', 'processid', {'?': 1})
    """
    with tempfile.TemporaryDirectory(prefix="bioscan_jax-") as scratch:
        source = open_source(data, scratch=Path(scratch))
        return _describe(source)


def _describe(source: ParquetBlocks) -> Description:
    names = source.schema.names
    survey: LineageSurvey | None = LineageSurvey() if lineage_columns(names) else None
    warnings: list[str] = []
    try:
        vector_schema(source.schema, 1, "float32")
    except InputError as error:
        warnings.append(f"embed refuses this: {error}")
    changes, characters, rejects, headers = CleaningCounts(), Counter(), Counter(), Counter()
    first_rejects: dict[str, str] = {}
    lengths, sequences, ids, sample = [], [], [], []
    for index in range(len(source)):
        block = source[index]
        locate = partial(source.locate, first=block.first_row)
        check_values(block.table, locate)
        given = block.table[source.sequence_column]
        cleaned = clean(given)
        changes += cleaned.changes
        usable = cleaned.reasons.is_null()
        kept = cleaned.sequences.filter(usable)
        texts = kept.unique()
        sample.append(texts.take(_spread(len(texts), -(-_STRAND_ROWS // len(source)))))
        lengths.append(pc.binary_length(kept).to_numpy())
        sequences.append(hash_text(pa.chunked_array([kept])))
        ids.append(hash_text(block.table[_ID]))
        rejects.update(cleaned.reasons.drop_null().to_pylist())
        for reason in cleaned.reasons.unique().drop_null().to_pylist():
            first_rejects.setdefault(reason, locate(pc.index(cleaned.reasons, reason).as_py()))
        foreign = pc.fill_null(pc.equal(cleaned.reasons, "not_dna"), False)
        for text in given.combine_chunks().filter(foreign).cast(pa.binary()).to_pylist():
            characters.update(foreign_characters(text.decode(errors="replace")))
        if survey is not None:
            try:
                survey.add(block.table, locate)
            except InputError as error:
                survey = None
                warnings.append(f"the lineages cannot be used: {error}")
        elif "description" in names:
            for column in (block.table[_ID], block.table["description"].drop_null()):
                marked = column.filter(pc.match_substring_regex(column, NEEDS_DIALECT)).slice(0, _HEADERS)
                headers.update(found[1].name for text in marked.to_pylist() if (found := read_dialect(text)))
    number = np.concatenate(lengths)
    quartiles = np.percentile(number, [0, 25, 50, 75, 100]) if len(number) else np.zeros(5)
    repeats, example = _repeats(source, np.concatenate(ids))
    distinct = len(np.unique(np.concatenate(sequences)))
    roles = find_roles(names)
    roles |= {"sequence": source.sequence_column, "id": source.id_column if source.id_column in names else _ID}
    if source.numbers_rows:
        del roles["id"]
    return Description(
        files=len(source.fingerprint),
        rows=source.rows,
        columns={field.name: str(field.type) for field in source.schema},
        roles=roles,
        lineage=_lineage_line(survey, names, headers),
        ranks={} if survey is None else dict(zip(RANKS, survey.known, strict=True)),
        warnings=warnings + ([] if survey is None else survey.warnings()),
        lengths=tuple(int(length) for length in quartiles),
        strands=survey_strands(pa.concat_arrays(sample)),
        repeated_ids=repeats,
        repeated_id=example,
        repeated_sequences=len(number) - distinct,
        changes=changes,
        characters=dict(characters.most_common()),
        rejects=dict(sorted(rejects.items())),
        first_rejects=first_rejects,
    )


def _spread(rows: int, most: int) -> pa.Array:
    """Returns at most so many row numbers, evenly spread."""
    return pa.array(np.unique(np.linspace(0, max(rows - 1, 0), min(rows, most)).astype(np.int64)))


def _strand_line(found: StrandSurvey) -> str:
    total = found.alike + found.reversed + found.unknown
    if found.unknown * 2 >= total:
        return (
            f"not determined: {found.unknown:,} of {total:,} sequences compared share too few words of 8 bases with "
            "the others to tell"
        )
    return (
        f"{found.reversed:,} of {total:,} sequences compared look like the reverse complement of most others; "
        f"{found.unknown:,} share too few words of 8 bases to tell"
    )


def _repeats(source: ParquetBlocks, hashes: np.ndarray) -> tuple[int, str | None]:
    """Returns how many rows repeat an id, and one such id; by hashes of 64 bits."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(again):
        return 0, None
    row = int(order[again[0]])
    block, offset = divmod(row, source.block_rows)
    return len(again), str(source[block].table[_ID][offset].as_py())


def _lineage_line(survey: LineageSurvey | None, names: list[str], headers: Counter[str]) -> str:
    if survey is None:
        inside = ", ".join(headers)
        return f"none in columns{f'; the headers hold some ({inside}), which are not read' if inside else ''}"
    if ranks := rank_columns(names):
        return f"rank columns {', '.join(ranks.values())}" + ("" if len(ranks) == len(RANKS) else "; others unknown")
    return f"column {lineage_columns(names)[0]}, in the dialect " + ", ".join(
        name for name, count in survey.dialects.most_common() if count
    )
