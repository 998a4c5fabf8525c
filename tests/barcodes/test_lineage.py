import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.lineage import RANKS, format_lineage, parse_lineage, read_lineages
from bioscan_jax.errors import InputError

# Other work on the machine must not fail a test.
unhurried = settings(deadline=None)

name = st.text(st.characters(exclude_characters=";", exclude_categories=("Cs",)), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(st.lists(st.none() | name, min_size=7, max_size=7))
@unhurried
def test_format_then_parse_returns_the_names(names: list[str | None]):
    assert parse_lineage(format_lineage(names)) == tuple(names)


@given(st.lists(st.text(" \tab", max_size=4), min_size=7, max_size=7))
@unhurried
def test_parse_then_format_changes_only_white_space(fields: list[str]):
    assert format_lineage(parse_lineage(";".join(fields))) == ";".join(field.strip() for field in fields)


@given(st.sets(st.integers(0, 6)))
@unhurried
def test_a_blank_rank_never_shifts_the_others(blank: set[int]):
    parsed = parse_lineage(";".join("  " if index in blank else rank for index, rank in enumerate(RANKS)))
    assert parsed == tuple(None if index in blank else rank for index, rank in enumerate(RANKS))


def test_names_are_stripped():
    assert parse_lineage(" Animalia ;Arthropoda;; Diptera;\t;Aedes;Aedes aegypti ") == (
        "Animalia",
        "Arthropoda",
        None,
        "Diptera",
        None,
        "Aedes",
        "Aedes aegypti",
    )
    assert format_lineage([" Animalia ", "", None, "  ", None, None, "x y"]) == "Animalia;;;;;;x y"


@pytest.mark.parametrize("lineage", ["", "Animalia", "a;b;c;d;e;f", "a;b;c;d;e;f;g;", ";;;;;;;"])
def test_a_lineage_of_other_than_seven_fields_is_refused(lineage: str):
    fields = lineage.count(";") + 1
    with pytest.raises(InputError, match=re.escape(f"the lineage {lineage!r} has {fields} fields; write seven")):
        parse_lineage(lineage)


@pytest.mark.parametrize("names", [[], ["a"] * 6, ["a"] * 8, "abcdefg"])
def test_other_than_seven_names_are_refused(names):
    with pytest.raises(InputError, match=re.escape(f"seven names, got {names!r}")):
        format_lineage(names)


def test_a_name_with_a_semicolon_is_refused():
    with pytest.raises(InputError, match="'Aedes;Culex' has a semicolon"):
        format_lineage([None, None, None, None, None, "Aedes;Culex", None])


def test_one_or_two_rank_columns_are_labels_unless_a_lineage_says_more():
    names = [
        column.to_pylist() for column in read_lineages(pa.table({"species_name": ["Gadus morhua", "Gadus sp. 1"]}))
    ]
    assert names == [[None] * 2] * 6 + [["Gadus morhua", None]]
    both = pa.table({"species": ["Gadus morhua"], "Taxon": ["k__Animalia; g__Gadus; s__morhua"]})
    assert [column[0].as_py() for column in read_lineages(both)][::6] == ["Animalia", "Gadus morhua"]
    with pytest.raises(InputError, match="of which genus or species is needed"):
        read_lineages(pa.table({"family": ["Gadidae"], "order": ["Gadiformes"]}))
