"""Lineages as public databases write them: written in a dialect, read back; and what counts as a name."""

import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.dialects import DIALECTS, read_dialect
from bioscan_jax.barcodes.lineage import RANKS, LineageSurvey, lineage_columns, read_lineages
from bioscan_jax.errors import InputError

unhurried = settings(deadline=None, max_examples=60)
UNRUHDINIUM = (
    "Eukaryota",
    "Dinoflagellata",
    "Dinophyceae",
    "Peridiniales",
    "Kryptoperidiniaceae",
    "Unruhdinium",
    "Unruhdinium kevei",
)
TUNA = ("Animalia", "Chordata", "Actinopterygii", "Perciformes", "Scombridae", "Sarda", "Sarda sarda")


def read(*lineages: str | None) -> list[tuple[str | None, ...]]:
    columns = read_lineages(pa.table({"taxonomy": pa.array(lineages, pa.string())}))
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def tuna(**without: None) -> tuple[str | None, ...]:
    return tuple(without.get(rank, name) for rank, name in zip(RANKS, TUNA, strict=True))


@pytest.mark.parametrize(
    ("lineage", "expected", "dialect"),
    [
        ("Animalia;Chordata;Actinopterygii;Perciformes;Scombridae;Sarda;Sarda sarda", TUNA, "seven fields"),
        ("Animalia;Chordata;Actinopterygii;Perciformes;Scombridae;Sarda;Sarda sarda;", TUNA, "seven fields"),
        ("Animalia;Chordata;Actinopterygii;Perciformes;Scombridae;Sarda;", tuna(species=None), "seven fields"),
        ("Animalia_1;Chordata_2;Actinopterygii_3;Perciformes_4;Scombridae_5;Sarda_6;Sarda sarda_7", TUNA, "MIDORI2"),
        (
            "root_1;Animalia_1;Chordata_2;Actinopterygii_3;order_Actinopterygii_3;Scombridae_5;Sarda_6;Sarda sarda_7",
            tuna(order=None),
            "MIDORI2",
        ),
        (
            "root_1;Animalia_1;Chordata_2;Actinopterygii_3;Perciformes_4;Scombridae_5;Sarda_6;Sarda_sarda_7;",
            TUNA,
            "MIDORI2",
        ),
        (
            "k__Animalia; p__Chordata; c__Actinopterygii; o__Perciformes; f__Scombridae; g__Sarda; s__Sarda_sarda",
            TUNA,
            "marked ranks",
        ),
        (
            "k__Animalia;p__Chordata;c__Actinopterygii;o__Perciformes;f__Scombridae;g__Sarda;s__sarda",
            TUNA,
            "marked ranks",
        ),
        (
            "k__Animalia_1;p__Chordata_2;c__Actinopterygii_3;o__Perciformes_4;f__Scombridae_5;g__Sarda_6;s__Sarda sarda_7",
            TUNA,
            "marked ranks",
        ),
        ("s__Sarda sarda;g__Sarda;k__Animalia", ("Animalia", *[None] * 4, *TUNA[5:]), "marked ranks"),
        ("k__Animalia;p__;c__;o__;f__;g__;s__", ("Animalia", *[None] * 6), "marked ranks"),
        ("d__Eukaryota;p__Arthropoda;c__Insecta", ("Eukaryota", "Arthropoda", "Insecta", *[None] * 4), "marked ranks"),
        ("d__Eukaryota;k__Fungi;p__Ascomycota;", ("Fungi", "Ascomycota", *[None] * 5), "marked ranks"),
        (
            "d__Bacteria;p__Bacillota;c__Bacilli;o__Bacillales;f__Bacillaceae;g__Bacillus_A;s__Bacillus_A cereus",
            (
                "Bacteria",
                "Bacillota",
                "Bacilli",
                "Bacillales",
                "Bacillaceae",
                "Bacillus_A",
                "Bacillus_A cereus",
            ),
            "marked ranks",
        ),
        (
            "k:Animalia,p:Chordata,c:Actinopterygii,o:Perciformes,f:Scombridae,g:Sarda,s:Sarda_sarda",
            TUNA,
            "SINTAX",
        ),
        (
            "tax=k:Animalia(1.00),p:Chordata(1.00),c:Actinopterygii(.98),o:Perciformes(0.9),f:Scombridae,g:Sarda,s:sarda;",
            TUNA,
            "SINTAX",
        ),
        (
            "k:k__Animalia,p:p__Chordata,c:c__Actinopterygii,o:o__Perciformes,f:f__Scombridae,g:g__Sarda,s:s__Sarda_sarda",
            TUNA,
            "SINTAX",
        ),
        (
            "D_0__Bacteria;D_1__Firmicutes;D_2__Bacilli;D_3__Bacillales;D_4__Bacillaceae;D_5__Bacillus;D_6__Bacillus subtilis",
            ("Bacteria", "Firmicutes", "Bacilli", "Bacillales", "Bacillaceae", "Bacillus", "Bacillus subtilis"),
            "SILVA D_0__",
        ),
        ("D_0__Bacteria;D_1__Firmicutes", ("Bacteria", "Firmicutes", *[None] * 5), "SILVA D_0__"),
        (
            "Epichloë_typhina|AB1|SH1.08FU|refs|k__Fungi;p__Ascomycota;c__Sordariomycetes;o__Hypocreales;"
            "f__Clavicipitaceae;g__Epichloë;s__Epichloë_typhina",
            (
                "Fungi",
                "Ascomycota",
                "Sordariomycetes",
                "Hypocreales",
                "Clavicipitaceae",
                "Epichloë",
                "Epichloë typhina",
            ),
            "UNITE",
        ),
        ("k__Fungi;p__Ascomycota;sh__SH1.08FU", ("Fungi", "Ascomycota", *[None] * 5), "marked ranks"),
        ("k__Fungi;p__Ascomycota;SH1234567.08FU", ("Fungi", "Ascomycota", *[None] * 5), "marked ranks"),
        (
            "k__Animalia|p__Chordata|c__Actinopterygii|o__Perciformes|f__Scombridae|g__Sarda|s__Sarda_sarda|t__SGB1",
            TUNA,
            "MetaPhlAn",
        ),
        ("k__Animalia|p__Chordata", ("Animalia", "Chordata", *[None] * 5), "MetaPhlAn"),
        (
            "Eukaryota;TSAR;Alveolata;Dinoflagellata;Dinophyceae;Peridiniales;Kryptoperidiniaceae;Unruhdinium;Unruhdinium_kevei",
            UNRUHDINIUM,
            "PR2",
        ),
        (
            "Eukaryota;Archaeplastida;Chlorophyta;Chlorophyta_X;Mamiellophyceae;Mamiellales;Mamiellales_X;Micromonas;Micromonas_pusilla;",
            (
                "Eukaryota",
                "Chlorophyta",
                "Mamiellophyceae",
                "Mamiellales",
                None,
                "Micromonas",
                "Micromonas pusilla",
            ),
            "PR2",
        ),
        (
            "Eukaryota;Alveolata;Dinoflagellata;Dinophyceae;Peridiniales;Kryptoperidiniaceae;Unruhdinium;Unruhdinium_kevei;",
            UNRUHDINIUM,
            "PR2",
        ),
        (
            "Bacteria;PANNAM;Cyanobacteria;Cyanophyceae;Cyanophyceae_X;Cyanophyceae_XX;Synechococcus;Synechococcus_sp.",
            ("Bacteria", "Cyanobacteria", "Cyanophyceae", None, None, "Synechococcus", None),
            "PR2",
        ),
        ("Unassigned", (None,) * 7, "unknown"),
        ("NA", (None,) * 7, "unknown"),
    ],
)
def test_a_lineage_is_read_by_the_rule_of_its_dialect(lineage, expected, dialect):
    assert read(lineage) == [expected]
    found = read_dialect(lineage)
    assert found is not None
    assert found[1].name == dialect


@pytest.mark.parametrize(
    "lineage",
    [
        "Animalia;Chordata",
        "a;b;c;d;e;f;g;h",
        "k__Animalia;Chordata",
        "g__Sarda;g__Thunnus",
        "x__Animalia;p__Chordata",
        "Animalia",
        "a;b;c;d;e;f;g;h;i",
        "D_0__Bacteria;Firmicutes",
    ],
)
def test_what_is_in_no_dialect_names_file_and_row(lineage):
    assert read_dialect(lineage) is None
    table = pa.table({"taxonomy": [None, ";".join(TUNA), lineage]})
    with pytest.raises(InputError, match=re.escape(f"x.parquet row 12 (counted from 0): the lineage {lineage!r} has")):
        read_lineages(table, locate=lambda row: f"x.parquet row {row + 10}")
    noted = []
    names = read_lineages(table, unreadable=lambda row, text: noted.append((row, text)))
    assert noted == [(2, lineage)]
    assert names[-1].to_pylist() == [None, "Sarda sarda", None]


def test_dialects_may_be_mixed_and_repeat():
    rows = ["k__Animalia;g__Sarda;s__sarda", ";".join(TUNA), None, "k__Animalia;g__Sarda;s__sarda", " "]
    assert [row[-1] for row in read(*rows)] == ["Sarda sarda", "Sarda sarda", None, "Sarda sarda", None]


word = st.from_regex(r"[A-Z][a-z]{3,8}", fullmatch=True).filter(
    lambda text: not re.search(r"(?i)unknown|unclass|uncult|unident|unassig|none|null|root|missing|clade", text)
)
epithet = st.from_regex(r"[a-z]{5,9}", fullmatch=True).filter(
    lambda text: not re.search(r"(?i)un|indet|environ|metagen|incertae|species|complex|group|clade|none|null", text)
)
MARKS = "kpcofgs"


@st.composite
def lineages(draw, blanks: bool = True) -> tuple[str | None, ...]:
    names = draw(st.lists(word, min_size=6, max_size=6, unique=True))
    species = f"{names[5]} {draw(epithet)}"
    blank = draw(st.sets(st.integers(1, 6))) if blanks else set()
    return tuple(None if rank in blank else name for rank, name in enumerate([*names, species]))


WRITERS = {
    "plain": lambda names: ";".join(name or "" for name in names),
    "trailing": lambda names: ";".join(name or "" for name in names) + ";",
    "qiime": lambda names: "; ".join(f"{m}__{(n or '').replace(' ', '_')}" for m, n in zip(MARKS, names, strict=True)),
    "gtdb": lambda names: ";".join(f"{m}__{n or ''}" for m, n in zip("dpcofgs", names, strict=True)),
    "sintax": lambda names: ",".join(
        f"{m}:{n.replace(' ', '_')}" for m, n in zip(MARKS, names, strict=True) if n is not None
    ),
    "sintax of qiime": lambda names: ",".join(
        f"{m}:{m}__{n.replace(' ', '_')}" for m, n in zip(MARKS, names, strict=True) if n is not None
    ),
    "confidences": lambda names: ",".join(f"{m}:{n}(0.97)" for m, n in zip(MARKS, names, strict=True) if n is not None),
    "levels": lambda names: ";".join(f"D_{i}__{n}" for i, n in enumerate(names) if n is not None),
    "unite": lambda names: (
        "A_b|AB1|SH1.08FU|reps|"
        + ";".join(f"{m}__{(n or '').replace(' ', '_')}" for m, n in zip(MARKS, names, strict=True))
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@unhurried
@given(names=lineages())
def test_written_in_a_dialect_and_read_back(writer: str, names):
    if writer == "sintax" and names.count(None) == 6:
        names = (*names[:1], "Chordata", *names[2:])
    assert read(WRITERS[writer](names)) == [names]


@unhurried
@given(
    names=lineages(blanks=False), numbers=st.lists(st.integers(1, 10**7), min_size=7, max_size=7), root=st.booleans()
)
def test_taxids_come_off(names, numbers, root):
    text = ";".join(f"{name}_{number}" for name, number in zip(names, numbers, strict=True))
    assert read(("root_1;" if root else "") + text) == [names]


@unhurried
@given(names=lineages(blanks=False), group=word, division=st.none() | word)
def test_pr2_keeps_seven_of_eight_and_of_nine(names, group, division):
    above = ["Eukaryota", group] if division is None else ["Eukaryota", group, division]
    assert read(";".join([*above, *names[1:6], names[6].replace(" ", "_")])) == [("Eukaryota", *names[1:])]


@unhurried
@given(names=lineages())
def test_the_columns_of_a_database_lose_their_marks(names):
    marked = {rank: [None if n is None else f"{m}__{n}"] for rank, m, n in zip(RANKS, MARKS, names, strict=True)}
    assert [column.to_pylist()[0] for column in read_lineages(pa.table(marked))] == list(names)


def test_taxids_in_rank_columns_come_off_too():
    table = pa.table(
        {rank: [f"{name}_{500 + i}", name] for i, (rank, name) in enumerate(zip(RANKS, TUNA, strict=True))}
    )
    assert [column.to_pylist() for column in read_lineages(table)] == [[name, name] for name in TUNA]


def test_dialects_have_each_a_name_a_rule_and_an_example_that_they_read():
    assert len({dialect.name for dialect in DIALECTS}) == len(DIALECTS)
    for dialect in DIALECTS:
        assert dialect.rule
        if "..." not in dialect.example:
            assert dialect.read(dialect.example) is not None, dialect.name


# what is there, and what the rules take from it


def test_rank_columns_without_a_kingdom_take_it_from_the_phylum():
    table = pa.table(
        {
            "phylum": ["Arthropoda", "Ascomycota", "Nobodyknows", None],
            "class": ["Insecta", None, None, None],
            "genus": ["Aedes", "Epichloe", "Xus", None],
            "species": ["aegypti", None, None, None],
            "taxon": ["Aedes aegypti", "x", "y", "z"],
        }
    )
    assert lineage_columns(table.column_names) == ["phylum", "class", "genus", "species"]
    names = read_lineages(table)
    assert names[0].to_pylist() == ["Animalia", "Fungi", None, None]
    assert names[3].to_pylist() == [None] * 4
    assert names[6].to_pylist() == ["Aedes aegypti", None, None, None]


def test_a_kingdom_column_is_never_filled():
    table = pa.table({rank: [None if rank == "kingdom" else "Arthropoda"] for rank in RANKS})
    assert read_lineages(table.cast(pa.schema([(rank, pa.string()) for rank in RANKS])))[0].to_pylist() == [None]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*RANKS, "taxonomy"], list(RANKS)),
        (["taxonomy", "genus", "family", "species"], ["taxonomy"]),
        (["Taxon"], ["Taxon"]),
        (["gtdb_taxonomy", "accession"], ["gtdb_taxonomy"]),
        (["phylum_name", "genus_name", "species_name"], ["phylum_name", "genus_name", "species_name"]),
        (["Kingdom", "Phylum", "Genus"], ["Kingdom", "Phylum", "Genus"]),
        (["genus", "Phylum"], ["Phylum", "genus"]),
        (["species", "Taxon"], ["Taxon"]),
        (["order", "Phylum", "class"], []),
        (["depth"], []),
    ],
)
def test_columns_of_lineages(names, expected):
    assert lineage_columns(names) == expected


def test_no_lineages_at_all_lists_the_columns_there_are():
    with pytest.raises(InputError, match="the columns are: depth, site"):
        read_lineages(pa.table({"depth": [1.0], "site": ["a"]}))


def test_a_rule_that_blanks_most_of_a_rank_says_so():
    survey = LineageSurvey()
    codes = [f"Animalia;Arthropoda;Insecta;Diptera;;Parornix;Parornix DRD{i:02}" for i in range(8)]
    survey.add(pa.table({"taxonomy": [*codes, *[";".join(TUNA)] * 3, "NA", None]}))
    assert survey.given == [11, 11, 11, 11, 3, 11, 11]
    assert survey.known == [11, 11, 11, 11, 3, 11, 3]
    (line,) = survey.warnings()
    assert "species: 8 of 11 names count as unknown" in line
    assert "'Parornix DRD00'" in line
    assert "specimen code" in line


def test_blanks_are_not_names_that_a_rule_took():
    survey = LineageSurvey()
    survey.add(pa.table({"taxonomy": ["Animalia;Chordata;;;NA;;", "k__Animalia;p__Chordata;g__;s__", None, " "] * 4}))
    assert survey.warnings() == []
    assert survey.known == [8, 8, 0, 0, 0, 0, 0]
    assert survey.dialects == {"seven fields": 1, "marked ranks": 1}


def test_unreadable_lineages_are_counted_and_the_first_is_placed():
    survey = LineageSurvey()
    survey.add(pa.table({"taxonomy": [";".join(TUNA)] * 3}), "a row {}".format)
    survey.add(pa.table({"taxonomy": [None, "a;b", "c", "a;b"]}), "b row {}".format)
    (line,) = survey.warnings()
    assert "3 of 7 rows have a lineage that cannot be read" in line
    assert "b row 1 (counted from 0): the lineage 'a;b' has 2 fields" in line
