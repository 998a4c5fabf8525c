"""The seven ranks, lineage strings, and the placeholder names that do not name a taxon."""

from collections.abc import Sequence

import pyarrow as pa

# Most of its functions are created at import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc

from bioscan_jax.errors import InputError

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
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


def parse_lineage(lineage: str) -> tuple[str | None, ...]:
    """Splits "K;P;C;O;F;G;S" into one name for each of `RANKS`.

    A blank field is an unknown rank and becomes None; white space around a name is removed.

    Raises:
        InputError: There are not exactly seven fields.

    Example:
        >>> parse_lineage("Animalia;Arthropoda;Insecta;Diptera;;Aedes;")
        ('Animalia', 'Arthropoda', 'Insecta', 'Diptera', None, 'Aedes', None)
    """
    fields = lineage.split(";")
    if len(fields) != len(RANKS):
        raise InputError(
            f"the lineage {lineage!r} has {len(fields)} fields; write seven, {';'.join(RANKS)}, blank where unknown"
        )
    return tuple(field.strip() or None for field in fields)


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


def read_lineages(table: pa.Table | pa.RecordBatch) -> tuple[pa.Array, ...]:
    """Returns the names of each row as one string array for each of `RANKS`, null where unknown.

    The seven rank columns are read if all are present, else `taxonomy`, where a null or blank cell means that all
    seven are unknown. White space is trimmed, and runs of it become one space. Then:

    - A name that matches `FILLERS`, or a species that matches `SPECIES_FILLERS`, is unknown.
    - A species that repeats another name of its row (genus 'Bombus', species 'Bombus') is unknown.
    - A species of one lower-case word is an epithet: it becomes 'Bombus terrestris' if the genus is known (genus
      'Bison', species 'bison' becomes 'Bison bison'), else it is unknown.

    No name is moved to another rank, and no rank is filled in from another.

    Raises:
        InputError: Neither form is present, a column is not text, or a lineage does not have seven fields.

    Example:
        >>> names = read_lineages(pa.table({"taxonomy": ["Animalia;Arthropoda;Insecta;;;Aedes;aegypti", "; ;;;;;sp. 1"]}))
        >>> names[-1].to_pylist()
        ['Aedes aegypti', None]
    """
    present = table.schema.names
    if all(rank in present for rank in RANKS):
        return _known_names([_as_strings(table, rank) for rank in RANKS])
    if LINEAGE_COLUMN not in present:
        raise InputError(
            f"no labels: there is neither a column {LINEAGE_COLUMN!r} (K;P;C;O;F;G;S) nor all of {', '.join(RANKS)}; "
            f"the columns are: {', '.join(present) or 'none'}"
        )
    lineages, row_of = _distinct(_as_strings(table, LINEAGE_COLUMN))
    lineages = pc.replace_with_mask(lineages, pc.match_substring_regex(lineages, r"^[\s\pZ]*$"), pa.scalar(";" * 6))
    fields = pc.split_pattern(lineages, ";")
    wrong = pc.index(pc.not_equal(pc.list_value_length(fields), len(RANKS)), True).as_py()
    if wrong >= 0:
        parse_lineage(lineages[wrong].as_py())
    known = _known_names([pc.list_element(fields, rank) for rank in range(len(RANKS))])
    return tuple(names.take(row_of) for names in known)


def _as_strings(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise InputError(f"column {name!r} has the Arrow type {column.type}; make it a text column")
    strings = column.cast(kind).cast(pa.string())
    return strings.combine_chunks() if isinstance(strings, pa.ChunkedArray) else strings


def _distinct(strings: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Returns the distinct values, and the index of each row's value (null for null)."""
    coded = strings.dictionary_encode()
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
