"""Which field or column of a lineage is which rank."""

import re
from itertools import product

import pyarrow as pa
import pytest

from bioscan_jax.barcodes.lineage import RANKS, format_lineage, read_lineages
from bioscan_jax.errors import InputError


def test_a_blank_rank_never_shifts_the_others():
    names = [f"{rank.title()}us" for rank in RANKS]
    wanted = [
        [name if kept else None for name, kept in zip(names, row, strict=True)] for row in product((0, 1), repeat=7)
    ]
    table = pa.table({"taxonomy": [format_lineage(row) for row in wanted]})
    found = [column.to_pylist() for column in read_lineages(table)]
    assert list(map(list, zip(*found, strict=True))) == wanted


def test_one_or_two_rank_columns_are_labels_unless_a_lineage_says_more():
    names = [
        column.to_pylist() for column in read_lineages(pa.table({"species_name": ["Gadus morhua", "Gadus sp. 1"]}))
    ]
    assert names == [[None] * 2] * 6 + [["Gadus morhua", None]]
    both = pa.table({"species": ["Gadus morhua"], "Taxon": ["k__Animalia; g__Gadus; s__morhua"]})
    assert [column[0].as_py() for column in read_lineages(both)][::6] == ["Animalia", "Gadus morhua"]
    with pytest.raises(InputError, match="of which genus or species is needed"):
        read_lineages(pa.table({"family": ["Gadidae"], "order": ["Gadiformes"]}))


def test_names_are_stripped():
    assert format_lineage([" Animalia ", "", None, "  ", None, None, "x y"]) == "Animalia;;;;;;x y"


@pytest.mark.parametrize("names", [[], ["a"] * 6, ["a"] * 8, "abcdefg"])
def test_other_than_seven_names_are_refused(names):
    with pytest.raises(InputError, match=re.escape(f"seven names, got {names!r}")):
        format_lineage(names)


def test_a_name_with_a_semicolon_is_refused():
    with pytest.raises(InputError, match="'Aedes;Culex' has a semicolon"):
        format_lineage([None, None, None, None, None, "Aedes;Culex", None])
