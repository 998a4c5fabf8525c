"""The seven ranks, lineage strings, and the placeholder names that do not name a taxon."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

# Most of its functions are created at import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc

from bioscan_jax.barcodes.aliases import KINGDOM_OF_PHYLUM, RANK_ROLES, find_column
from bioscan_jax.barcodes.dialects import NEEDS_DIALECT, read_dialect, strip_marks
from bioscan_jax.errors import InputError, printable

RANKS = RANK_ROLES
"""Ranks from the root down, which are also the names of the rank columns."""

LINEAGE_COLUMN = "taxonomy"
"""Column with "K;P;C;O;F;G;S", read unless all seven rank columns are present."""

_UNKNOWN = (
    "unknown|unclassified|uncultured|uncultivated|unidentified|unassigned|undetermined|undescribed|unnamed|unplaced"
)

FILLERS = {
    r"^[ -@[-`{-~–—]*$": "no letter at all: blank, '-', '?', '123'",
    r"(?i)^(na|n/a|nan|none|null|missing|no rank|not (assigned|available|determined|identified))$": "NA, nan, None",
    r"^[a-z]__$": "an empty rank of Greengenes, SILVA or UNITE: 'g__'",
    rf"(?i)(^|[ _-])({_UNKNOWN})([^A-Za-z]|$)": "'Unknown', 'unclassified Diptera', 'Bacteria_unclassified'",
    r"(?i)(^|[ _-])environmental([^A-Za-z]|$)": "'environmental samples'",
    r"(?i)(^|[ _-])metagenomes?$": "'marine metagenome'",
    r"(?i)(^|[ _-])incertae[ _-]sedis": "'Incertae Sedis', 'Ascomycota_cls_Incertae_sedis'",
    r"_X+$": "a placeholder of PR2: 'Dino-Group-II_X', 'Dino-Group-II_XX'",
    r"(^|[ _-])[Ss]pp?([^A-Za-z]|[A-Z]|$)": "'sp.', 'Aedes sp. BOLD:AAA1234', 'Aedes spp.', 'Litholophus spB'",
    r"(?i)(^|[ _])(cf|aff|nr|indet)([ ._]|$)": "'Aedes cf. vexans', 'aff.', 'nr.', 'Aedes indet.'",
    r"(?i)^(gen|fam)\.": "'gen. nov.', 'Fam. indet.'",
    r"\?": "doubt: 'Aedes vexans?'",
}
"""Regular expressions (RE2) that mark a name of any rank as unknown, each with examples of what it matches."""

SPECIES_FILLERS = {
    r"BOLD:?[A-Z]{3}[0-9]": "the number of a BOLD bin: 'BOLD:AAA1234'",
    r"^\S+ \S*[0-9]\S*$": "a specimen code for an epithet: 'Diolcogaster jft30', 'Parornix DRD01'",
    r"(?i)^\S+ \S+[ _-](species[ -])?(complex|group|agg\.?|aggregate)$": "several species: 'Idia lubricalis complex'",
    r"(?i)[ _-]clade([ _-]|$)": "an unnamed clade: 'Ostreococcus clade B'",
}
"""Further expressions that mark a species as unknown. A code after a full binomial ('Allolobophora chlorotica L1') is
a valid name."""

_EPITHET = r"^[a-z][^ A-Z]*$"
_SLAB_ROWS = 1 << 20


def format_lineage(names: Sequence[str | None]) -> str:
    """Joins one name for each of `RANKS` to "K;P;C;O;F;G;S"; None becomes a blank field.

    Raises:
        InputError: There are not exactly seven names, or one contains a semicolon.

    Example:
        >>> format_lineage(["Animalia", "Arthropoda", None, None, None, None, None])
        'Animalia;Arthropoda;;;;;'
    """
    if isinstance(names, str) or len(names) != len(RANKS):
        raise InputError(f"a lineage has seven names, got {names!r}; pass one for each of {', '.join(RANKS)}")
    for name in names:
        if name is not None and ";" in name:
            raise InputError(f"the name {name!r} has a semicolon, which separates ranks in a lineage; remove it")
    return ";".join((name or "").strip() for name in names)


def lineage_columns(names: Sequence[str]) -> list[str]:
    """Returns the columns that `read_lineages` reads, of a table with these columns; none if it has no lineages.

    The first of these that there is: all seven `RANKS`; `taxonomy`; three or more rank columns under the names of
    `bioscan_jax.barcodes.aliases`, one of them genus or species; a lineage column of these aliases; one or two such rank
    columns.
    """
    if ranks := rank_columns(names):
        return list(ranks.values())
    lineage = LINEAGE_COLUMN if LINEAGE_COLUMN in names else find_column("lineage", names)
    return [] if lineage is None else [lineage]


def rank_columns(names: Sequence[str]) -> dict[str, str]:
    """Returns the column of each rank that `read_lineages` reads; none if it reads a lineage column, or nothing.

    Example:
        >>> rank_columns(["processid", "genus", "species_name"]), rank_columns(["species", "taxonomy"])
        ({'genus': 'genus', 'species': 'species_name'}, {})
    """
    if all(rank in names for rank in RANKS):
        return {rank: rank for rank in RANKS}
    found = {rank: find_column(rank, names) for rank in RANKS}
    there = {rank: column for rank, column in found.items() if column is not None}
    lineage = LINEAGE_COLUMN in names or (len(there) < 3 and find_column("lineage", names) is not None)
    return {} if lineage or not {"genus", "species"} & there.keys() else there


def missing_lineages(names: Sequence[str]) -> InputError:
    """Returns the error for a table that has no lineages among these columns."""
    shown = ", ".join(printable(name) for name in names[:30]) or "none"
    return InputError(
        f"no labels: there is neither a column {LINEAGE_COLUMN!r} (K;P;C;O;F;G;S) nor columns such as "
        f"{', '.join(RANKS)}, of which genus or species is needed; the columns are: {shown}{', ...' if len(names) > 30 else ''}"
    )


def read_lineages(
    table: pa.Table | pa.RecordBatch,
    *,
    locate: Callable[[int], str] | None = None,
    unreadable: Callable[[int, str], object] | None = None,
) -> tuple[pa.Array, ...]:
    """Returns the names of each row as one string array for each of `RANKS`, null where unknown.

    The columns are those of `lineage_columns`. A lineage may be in any of `bioscan_jax.barcodes.dialects.DIALECTS`; a
    null or blank one means that all seven ranks are unknown. Rank columns that are not there are unknown, but a missing
    kingdom is that of the phylum (`aliases.KINGDOM_OF_PHYLUM`). White space is trimmed, and runs of it become one
    space. Then:

    - A name that matches `FILLERS`, or a species that matches `SPECIES_FILLERS`, is unknown.
    - A species that repeats another name of its row (genus 'Bombus', species 'Bombus') is unknown.
    - A species of one lower-case word is an epithet: it becomes 'Bombus terrestris' if the genus is known (genus
      'Bison', species 'bison' becomes 'Bison bison'), else it is unknown.

    No name is moved to another rank, and no other rank is filled in.

    Args:
        table: Rows with the columns.
        locate: Returns the file and row of a row of the table, for messages.
        unreadable: Called with the first row and the text of a lineage that cannot be read, whose ranks then are
            unknown; without it, that is an error.

    Raises:
        InputError: Neither form is present, a column is not text, or a lineage is in no known dialect.

    Example:
        >>> names = read_lineages(pa.table({"taxonomy": ["Animalia;Arthropoda;Insecta;;;Aedes;aegypti", "; ;;;;;sp. 1"]}))
        >>> names[-1].to_pylist()
        ['Aedes aegypti', None]
    """
    columns, row_of = _given_names(table, locate, unreadable)
    known = _known_names(columns)
    return known if row_of is None else tuple(names.take(row_of) for names in known)


def coded_lineages(
    batches: Iterable[pa.RecordBatch], *, locate: Callable[[int], str] | None = None
) -> tuple[pa.DictionaryArray, ...]:
    """Reads the lineages of many rows as `read_lineages` does, in 28 bytes a row and each distinct name once.

    Args:
        batches: Rows with the columns.
        locate: Returns the file and row of a row, counted over all batches, for messages.

    Returns:
        One array of codes and names for each of `RANKS`, null where unknown.

    Raises:
        InputError: As for `read_lineages`.
    """
    kind = pa.dictionary(pa.int32(), pa.string())
    coded: list[list[pa.DictionaryArray]] = [[] for _ in RANKS]
    first = 0
    for table in _in_slabs(batches):
        read = read_lineages(table, locate=None if locate is None else lambda row, at=first: locate(at + row))
        for chunks, names in zip(coded, read, strict=True):
            chunks.append(names.dictionary_encode())
        first += table.num_rows
    return tuple(pa.chunked_array(chunks, kind).unify_dictionaries().combine_chunks() for chunks in coded)


def _in_slabs(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Joins small batches, so that there are few dictionaries to unify."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _SLAB_ROWS:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _given_names(
    table: pa.Table | pa.RecordBatch,
    locate: Callable[[int], str] | None,
    unreadable: Callable[[int, str], object] | None,
    dialects: Counter[str] | None = None,
) -> tuple[list[pa.Array], pa.Array | None]:
    """Returns the names as written, by rank, without the marks of a dialect; and the entry of each row, if not its own."""
    present = table.schema.names
    wanted = lineage_columns(present)
    if not wanted:
        raise missing_lineages(present)
    if ranks := rank_columns(present):
        there = {rank: _as_strings(table, column) for rank, column in ranks.items()}
        nothing = pa.nulls(table.num_rows, pa.string())
        columns = _without_marks([there.get(rank, nothing) for rank in RANKS])
        return [*(columns if "kingdom" in there else [_kingdoms(columns[1]), *columns[1:]])], None
    lineages, row_of = _distinct(_text(table, wanted[0]))
    lineages = pc.replace_with_mask(lineages, pc.match_substring_regex(lineages, r"^[\s\pZ]*$"), pa.scalar(";" * 6))
    fields = pc.split_pattern(lineages, ";")
    marked = pc.or_(
        pc.not_equal(pc.list_value_length(fields), len(RANKS)), pc.match_substring_regex(lineages, NEEDS_DIALECT)
    )
    plain = np.flatnonzero(~marked.to_numpy(zero_copy_only=False))
    others = np.flatnonzero(marked.to_numpy(zero_copy_only=False))
    read = []
    for entry in others.tolist():
        text = lineages[entry].as_py()
        found = read_dialect(text)
        if found is None:
            row = pc.index(row_of, entry).as_py()
            if unreadable is None:
                raise _unreadable(text, None if locate is None else locate(row))
            unreadable(row, text)
        read.append((None,) * len(RANKS) if found is None else found[0])
        if dialects is not None:
            dialects["unreadable" if found is None else found[1].name] += 1
    if dialects is not None:
        dialects["seven fields"] += len(plain) - int(pc.sum(pc.equal(lineages, ";" * 6)).as_py() or 0)
    kept = fields.take(pa.array(plain))
    ranks = [pc.list_element(kept, rank) for rank in range(len(RANKS))]
    if len(others):
        back = pa.array(np.argsort(np.concatenate([plain, others]), kind="stable"))
        more = [pa.array([names[rank] for names in read], pa.string()) for rank in range(len(RANKS))]
        ranks = [pa.concat_arrays([one, two]).take(back) for one, two in zip(ranks, more, strict=True)]
    return ranks, row_of


def _unreadable(lineage: str, where: str | None) -> InputError:
    fields = lineage.count(";") + 1
    place = "" if where is None else f"{where} (counted from 0): "
    shown = lineage if len(lineage) <= 120 else lineage[:120] + "..."
    return InputError(
        f"{place}the lineage {shown!r} has {fields} fields; write seven, {';'.join(RANKS)}, blank where unknown, or mark "
        "the ranks as QIIME, SINTAX, SILVA or UNITE do (k__...;p__...)"
    )


def _without_marks(columns: list[pa.Array]) -> list[pa.Array]:
    """Takes `g__` and `_5005` off names in rank columns, where there are any."""
    marks = r"^\s*[A-Za-z]{1,2}(__|:)\s*[^\s]|_[0-9]+$"
    wanted = np.zeros(len(columns[0]), bool)
    for column in columns:
        names, row_of = _distinct(column)
        found = pc.match_substring_regex(names, marks)
        if pc.any(found).as_py():
            wanted |= pc.fill_null(found.take(row_of), False).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(wanted)
    if not len(rows):
        return columns
    given = zip(*(column.take(pa.array(rows)).to_pylist() for column in columns), strict=True)
    bare = list(zip(*map(strip_marks, given), strict=True))
    return [
        pc.replace_with_mask(column, pa.array(wanted), pa.array(names, pa.string()))
        for column, names in zip(columns, bare, strict=True)
    ]


def _kingdoms(phyla: pa.Array) -> pa.Array:
    names, row_of = _distinct(phyla)
    return pa.array([KINGDOM_OF_PHYLUM.get((name or "").strip()) for name in names.to_pylist()], pa.string()).take(
        row_of
    )


@dataclass
class LineageSurvey:
    """What the lineages of an input hold, block after block, and what of it the rules do not take for a name."""

    rows: int = 0
    given: list[int] = field(default_factory=lambda: [0] * len(RANKS))
    """Rows with something written at each rank that is not a mere blank such as '' or 'NA'."""
    known: list[int] = field(default_factory=lambda: [0] * len(RANKS))
    """Rows with a name at each rank."""
    dialects: Counter[str] = field(default_factory=Counter)
    """Distinct lineages by dialect, within blocks, blank ones left out; empty for rank columns."""
    blanked: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in RANKS])
    """For each rank, rows whose name counts as unknown, by the rule in words."""
    examples: list[dict[str, str]] = field(default_factory=lambda: [{} for _ in RANKS])
    """The first such name of each rule."""
    unreadable: int = 0
    first_unreadable: str | None = None
    """Place and text of the first lineage that cannot be read."""

    def add(self, table: pa.Table | pa.RecordBatch, locate: Callable[[int], str] = "row {}".format) -> None:
        """Counts the rows of a block.

        Raises:
            InputError: There are no lineages, or a column is not text.
        """
        bad: set[str] = set()

        def note(row: int, text: str) -> None:
            bad.add(text)
            if self.first_unreadable is None:
                self.first_unreadable = str(_unreadable(text, locate(row)))

        columns, row_of = _given_names(table, locate, note, self.dialects)
        weights = np.ones(len(columns[0]), np.int64)
        if row_of is not None:
            rows = row_of.drop_null().to_numpy()
            weights = np.bincount(rows, minlength=len(columns[0]))
        if bad:
            column = _as_strings(table, lineage_columns(table.schema.names)[0])
            self.unreadable += pc.sum(pc.is_in(column, value_set=pa.array(sorted(bad), pa.string()))).as_py() or 0
        self.rows += table.num_rows
        known = _known_names(columns)
        for rank, (written, names) in enumerate(zip(columns, known, strict=True)):
            there = pc.fill_null(pc.invert(pc.match_substring_regex(written, _BLANK)), False).to_numpy(
                zero_copy_only=False
            )
            named = names.is_valid().to_numpy(zero_copy_only=False)
            self.given[rank] += int(weights[there].sum())
            self.known[rank] += int(weights[named].sum())
            lost = np.flatnonzero(there & ~named)
            if not len(lost):
                continue
            coded = pc.utf8_trim_whitespace(written.take(pa.array(lost))).dictionary_encode()
            totals = np.bincount(coded.indices.to_numpy(), weights[lost], len(coded.dictionary)).astype(int)
            for name, total in zip(coded.dictionary.to_pylist(), totals.tolist(), strict=True):
                rule = _rule_of(name, RANKS[rank])
                self.blanked[rank][rule] += total
                self.examples[rank].setdefault(rule, name)

    def warnings(self) -> list[str]:
        """Returns one line for the lineages that cannot be read, and one for each rank that a rule mostly blanks."""
        lines = []
        if self.unreadable:
            lines.append(
                f"{self.unreadable:,} of {self.rows:,} rows have a lineage that cannot be read; {self.first_unreadable}"
            )
        for rank, given, blanked, examples in zip(RANKS, self.given, self.blanked, self.examples, strict=True):
            lost = sum(blanked.values())
            if lost * 2 > given and lost > 1:
                rule, count = blanked.most_common(1)[0]
                lines.append(
                    f"{rank}: {lost:,} of {given:,} names count as unknown, {count:,} of them such as "
                    f"{examples[rule]!r} (rule: {rule}); write plain names if these are names"
                )
        return lines


_BLANK = "|".join(f"(?:{pattern})" for pattern in [*FILLERS][:3])


def _rule_of(name: str, rank: str) -> str:
    for pattern, words in (FILLERS | (SPECIES_FILLERS if rank == "species" else {})).items():
        if pc.match_substring_regex(pa.array([name]), pattern)[0].as_py():
            return words
    return "a species that repeats another rank's name, or an epithet without a genus"


def _text(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array | pa.ChunkedArray:
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise InputError(f"column {name!r} has the Arrow type {column.type}; make it a text column")
    return column.cast(kind).cast(pa.string())


def _as_strings(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    strings = _text(table, name)
    return strings.combine_chunks() if isinstance(strings, pa.ChunkedArray) else strings


def _distinct(strings: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Returns the distinct values, and the index of each row's value (null for null)."""
    coded = strings.dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):  # all its chunks have the same dictionary
        coded = coded.combine_chunks()
    return coded.dictionary, coded.indices


def _known_names(columns: Sequence[pa.Array]) -> tuple[pa.Array, ...]:
    """Applies the rules of `read_lineages`."""
    ranks = []
    for rank, column in zip(RANKS, columns, strict=True):
        names, row_of = _distinct(column)
        names = pc.utf8_trim_whitespace(pc.replace_substring_regex(names, r"[\s\pZ]+", " "))
        patterns = [*FILLERS, *(SPECIES_FILLERS if rank == "species" else ())]
        filler = pc.match_substring_regex(names, "|".join(f"(?:{pattern})" for pattern in patterns))
        ranks.append(pc.if_else(filler, pa.scalar(None, pa.string()), names).take(row_of))
    *above, species = ranks
    genus = above[RANKS.index("genus")]
    for names in above:
        repeated = pc.fill_null(pc.equal(species, names), False)
        species = pc.if_else(repeated, pa.scalar(None, pa.string()), species)
    epithet = pc.fill_null(pc.match_substring_regex(species, _EPITHET), False)
    binomial = pc.call_function("binary_join_element_wise", [genus, species, pa.scalar(" ")])
    return (*above, pc.if_else(epithet, binomial, species))
