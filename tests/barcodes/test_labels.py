import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes import lineage as lineage_module
from bioscan_jax.barcodes.labels import Conflict, LabelSpace
from bioscan_jax.barcodes.lineage import FILLERS, RANKS, SPECIES_FILLERS, coded_lineages, read_lineages
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.errors import InputError

# Other work on the machine must not fail a test.
unhurried = settings(deadline=None, max_examples=40)

Lineage = tuple[str | None, ...]

lineage = st.tuples(*(st.none() | st.sampled_from([f"{rank.title()}{letter}" for letter in "abc"]) for rank in RANKS))
lineages = st.lists(lineage, min_size=1, max_size=25)
# With these every space has something to tell apart.
TWO_KINGDOMS: list[Lineage] = [("Xa", *[None] * 6), ("Xb", *[None] * 6)]


def as_table(rows: list[Lineage]) -> pa.Table:
    return pa.table([pa.array([row[r] for row in rows], pa.string()) for r in range(7)], names=list(RANKS))


def as_text(rows: list[Lineage]) -> pa.Table:
    return pa.table({"taxonomy": [";".join(name or "" for name in row) for row in rows]})


def as_rows(columns: tuple[pa.Array, ...]) -> list[Lineage]:
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def read_one(genus: str | None, species: str | None) -> tuple[str | None, str | None]:
    row = as_rows(read_lineages(as_table([("Animalia", None, None, "Hymenoptera", "Apidae", genus, species)])))[0]
    assert row[:5] == ("Animalia", None, None, "Hymenoptera", "Apidae")
    return row[5:]


def in_names(space: LabelSpace, path: np.ndarray) -> Lineage:
    return tuple(None if code < 0 else space.names[rank][code] for rank, code in enumerate(path))


def by_hand(rows: list[Lineage]) -> tuple[dict[Lineage, Lineage], list[Conflict]]:
    """The path of each row and the conflicts, by the rules of LabelSpace applied row by row."""
    path: dict[tuple[int, str], Lineage] = {}
    conflicts = []
    for rank in range(7):
        votes: dict[str, Counter[tuple[int, str]]] = {}
        for row in rows:
            if (name := row[rank]) is not None:
                votes.setdefault(name, Counter()).update(
                    [max((above, other) for above, other in enumerate(row[:rank]) if other)] if any(row[:rank]) else []
                )
        for name, stated in sorted(votes.items()):
            finest = max((above for above, _ in stated), default=-1)
            ranked = sorted((-rows, other) for (above, other), rows in stated.items() if above == finest)
            upper = path[finest, ranked[0][1]] if ranked else (None,) * 7
            if len(ranked) > 1:
                parents = tuple((other, -rows) for rows, other in ranked)
                conflicts.append(Conflict(RANKS[rank], name, RANKS[finest], parents, parents[0][0]))
            path[rank, name] = (*upper[:rank], name, *[None] * (6 - rank))
    paths = {row: path[max((r, name) for r, name in enumerate(row) if name)] for row in rows if any(row)}
    return paths, conflicts


@given(lineages)
@unhurried
def test_both_forms_read_the_same_and_blanks_keep_their_rank(rows: list[Lineage]):
    assert as_rows(read_lineages(as_table(rows))) == rows
    assert as_rows(read_lineages(as_text(rows))) == rows


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_columns_may_be_chunked_sliced_dictionaries_and_views(kind: pa.DataType):
    rows = [("Animalia", None, None, None, "Apidae", "Bombus", "terrestris")] * 3 + [(None,) * 7]
    wanted = [(*row[:6], "Bombus terrestris") if row[0] else row for row in rows]
    for table in (as_table(rows), as_text(rows)):
        table = pa.table([column.cast(kind) for column in table.columns], names=table.column_names)
        chunked = pa.concat_tables([table.slice(1, 2), table.slice(3), table.slice(0, 0)])
        assert as_rows(read_lineages(table)) == wanted
        assert as_rows(read_lineages(chunked)) == wanted[1:]
        assert as_rows(read_lineages(table.slice(1).combine_chunks().to_batches()[0])) == wanted[1:]
    coded = pa.table([column.dictionary_encode() for column in as_table(rows).columns], names=list(RANKS))
    assert as_rows(read_lineages(coded)) == wanted
    assert as_rows(read_lineages(as_table(rows).slice(0, 0))) == []


@given(lineages, st.integers(1, 5))
@unhurried
def test_lineages_read_in_batches_are_those_read_at_once(rows: list[Lineage], per_batch: int):
    for table in (as_table(rows), as_text(rows)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lineage_module, "_SLAB_ROWS", 2)
            coded = coded_lineages(table.to_batches(max_chunksize=per_batch))
        assert as_rows([names.cast(pa.string()) for names in coded]) == rows


def test_the_first_unreadable_lineage_is_located_over_all_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lineage_module, "_SLAB_ROWS", 2)
    batches = pa.table({"taxonomy": [";;;;;;"] * 5 + ["a;b"]}).to_batches(max_chunksize=1)
    with pytest.raises(InputError, match=r"row 5 \(counted from 0\): the lineage 'a;b' has 2 fields"):
        coded_lineages(batches, locate="row {}".format)


@pytest.mark.slow
def test_lineages_beyond_the_32_bit_offsets_of_arrow_are_read():
    """3 GB of text: 28 million rows, a million of them different."""
    letters = [f"{i:06d}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(1_000_000)]
    row = pa.array(
        [f"Animalia;Arthropoda;Insecta;Diptera;Culicidae;Genus{i[:5]};Genus{i[:5]} species{i}" for i in letters]
    )
    whole = pa.table({"taxonomy": pa.chunked_array([row] * 28)})
    assert whole.nbytes > 2**31
    coded = coded_lineages(whole.to_batches())
    assert [len(names.dictionary) for names in coded] == [1, 1, 1, 1, 1, 100_000, 1_000_000]
    assert {len(names) for names in coded} == {28_000_000}
    assert read_lineages(whole)[0].null_count == 0


def test_rank_columns_win_over_the_lineage_column_if_all_seven_are_present():
    both = as_table([("Animalia", *[None] * 6)]).append_column("taxonomy", [["Plantae;;;;;;"]])
    assert as_rows(read_lineages(both)) == [("Animalia", *[None] * 6)]
    assert as_rows(read_lineages(both.drop_columns(["genus"]))) == [("Plantae", *[None] * 6)]


def test_a_null_or_blank_lineage_is_unknown_at_all_ranks():
    table = pa.table({"taxonomy": [None, "", " \t", ";;;;;;"]})
    assert as_rows(read_lineages(table)) == [(None,) * 7] * 4
    nothing = pa.table({rank: pa.nulls(2) for rank in RANKS})
    assert as_rows(read_lineages(nothing)) == [(None,) * 7] * 2


@pytest.mark.parametrize(
    "filler",
    [
        "",
        "  ",
        "\xa0",
        "-",
        "?",
        "123",
        "NA",
        "nan",
        "None",
        "n/a",
        "NULL",
        "no rank",
        "not assigned",
        "g__",
        "unknown",
        "Unknown",
        "Unknown genus",
        "unclassified Apidae",
        "Bacteria_unclassified",
        "uncultured",
        "Uncultured bacterium",
        "unknown_species",
        "environmental samples",
        "environmental sample",
        "eukaryote environmental sequence",
        "metagenome",
        "marine metagenome",
        "Incertae sedis",
        "Apidae incertae sedis",
        "Ascomycota_cls_Incertae_sedis",
        "INCERTAE-SEDIS",
        "Dino-Group-II_X",
        "Dino-Group-II_XX",
        "sp.",
        "sp",
        "Bombus sp.",
        "Bombus sp. 3",
        "Bombus sp",
        "Bombus spp.",
        "Bombus_sp.",
        "Bombus n. sp.",
        "Bombus sp. BOLD:AAA1234",
        "Bombus sp.XZ1",
        "Litholophus spB",
        "Ankylochrysis sp1.",
        "Dino-Group-II_XX_sp.",
        "Bombus cf. lucorum",
        "Bombus cf lucorum",
        "Bombus aff. lucorum",
        "Bombus nr. lucorum",
        "Bombus indet.",
        "indet.",
        "gen. nov.",
        "Bombus lucorum?",
    ],
)
def test_fillers_are_unknown_at_every_rank(filler: str):
    assert as_rows(read_lineages(as_table([(filler,) * 7]))) == [(None,) * 7]
    assert as_rows(read_lineages(as_text([(filler,) * 7]))) == [(None,) * 7]


@pytest.mark.parametrize(
    "filler",
    [
        "BOLD:AAA1234",
        "Bombus BOLD:AAA1234",
        "Bombus jft30",
        "Bombus DRD01",
        "Bombus lucorum complex",
        "Bombus lucorum_group",
        "Bombus lucorum agg.",
        "Bombus clade B",
    ],
)
def test_fillers_of_species_are_unknown_as_species(filler: str):
    assert read_one("Bombus", filler) == ("Bombus", None)


@pytest.mark.parametrize(
    "name",
    [
        "Bombus terrestris",
        "Aporrectodea caliginosa L3",
        "Spio speciosa",
        "Spirobolus nanus",
        "Nana unknowni",
        "Nanus naso",
        "Espeletia sparsa",
        "Cfa affinis",
        "Environmentalia prima",
        "Pseudo-nitzschia pungens",
        "Xus X-album",
        "Salix x fragilis",
        "Canis lupus ssp. familiaris",
        "Polygonia c-album",
        "Ünus nöme",
    ],
)
def test_real_names_are_kept(name: str):
    genus = name.split()[0]
    assert read_one(genus, name) == (genus, name)


@pytest.mark.parametrize(
    "name", ["Dino-Group-II", "MAST-3L", "Tintinnopsis 04", "Haptophyta Clade HAP2", "OLIGO5", "Ia"]
)
def test_numbered_groups_above_the_species_are_kept(name: str):
    assert as_rows(read_lineages(as_table([(*[name] * 6, None)]))) == [(*[name] * 6, None)]


def test_every_filler_matches_its_examples():
    assert all(caught.strip() and re.compile(pattern) for pattern, caught in {**FILLERS, **SPECIES_FILLERS}.items())


@pytest.mark.parametrize(
    ("genus", "species", "known"),
    [
        ("Bombus", "terrestris", ("Bombus", "Bombus terrestris")),
        ("Bombus", " Bombus  terrestris\u00a0", ("Bombus", "Bombus terrestris")),
        ("Polygonia", "c-album", ("Polygonia", "Polygonia c-album")),
        ("Bison", "bison", ("Bison", "Bison bison")),
        ("Bombus", "Bombus", ("Bombus", None)),
        ("Bombus", "Apidae", ("Bombus", None)),
        ("Bombus", "Apis", ("Bombus", "Apis")),
        ("unknown", "terrestris", (None, None)),
        (None, "terrestris", (None, None)),
        (None, "Bombus terrestris", (None, "Bombus terrestris")),
        ("Bombus", "sp.", ("Bombus", None)),
        (" ", None, (None, None)),
    ],
)
def test_species_are_binomials(genus: str | None, species: str | None, known: tuple[str | None, str | None]):
    assert read_one(genus, species) == known


@pytest.mark.parametrize("text", ["Animalia", "a;b;c;d;e;f", "a;b;c;d;e;f;g;h"])
def test_a_lineage_of_other_than_seven_fields_is_quoted(text: str):
    table = pa.table({"taxonomy": ["a;;;;;;", None, text]})
    with pytest.raises(InputError, match=re.escape(f"the lineage {text!r} has {text.count(';') + 1} fields")):
        read_lineages(table)


def test_missing_or_mistyped_columns_are_named():
    with pytest.raises(InputError, match=r"neither a column 'taxonomy' .* the columns are: sequence_id, family$"):
        read_lineages(pa.table({"sequence_id": ["a"], "family": ["Apidae"]}))
    with pytest.raises(InputError, match="the columns are: none$"):
        read_lineages(pa.table({}))
    with pytest.raises(InputError, match="column 'taxonomy' has the Arrow type int64"):
        read_lineages(pa.table({"taxonomy": [1]}))


@given(lineages, lineages)
@unhurried
def test_every_row_gets_the_path_of_the_rules(rows: list[Lineage], others: list[Lineage]):
    rows = rows + TWO_KINGDOMS
    space = LabelSpace.build([as_table(rows)])
    wanted, conflicts = by_hand(rows)
    assert space.conflicts == tuple(conflicts)
    paths = [in_names(space, path) for path in space.encode(read_lineages(as_table(rows)))]
    assert paths == [wanted.get(row, (None,) * 7) for row in rows]
    for rank in range(7):
        assert space.names[rank] == tuple(sorted({path[rank] for path in wanted.values()} - {None}))
        counts = Counter(path[rank] for path in paths)
        assert space.counts[rank].tolist() == [counts[name] for name in space.names[rank]]
    # Rows that were not used to build the space also become paths in it.
    unseen = [(*row[:5], "Unseen", None) for row in others] + others
    whole = {path[: rank + 1].tobytes() for path in space.leaf_paths() for rank in range(7)}
    for path in space.encode(read_lineages(as_table(unseen))):
        known = np.flatnonzero(path >= 0)
        assert not len(known) or path[: known[-1] + 1].tobytes() in whole


@given(lineages)
@unhurried
def test_leaves_cover_every_taxon_once_and_agree_with_the_parents(rows: list[Lineage]):
    space = LabelSpace.build([as_table(rows + TWO_KINGDOMS)])
    leaves = space.leaf_paths()
    finest = [in_names(space, path)[np.flatnonzero(path >= 0)[-1]] for path in leaves]
    assert len(set(finest)) == len(finest)
    assert leaves.dtype == np.int32
    for rank in range(7):
        assert set(leaves[:, rank]) - {-1} == set(range(len(space.names[rank])))
        assert space.parents[rank].shape == space.counts[rank].shape == (len(space.names[rank]),)
        on = leaves[:, rank] >= 0
        above = leaves[on, rank - 1] if rank else np.full(on.sum(), -1)
        np.testing.assert_array_equal(space.parents[rank][leaves[on, rank]], above)


@given(lineages, st.randoms(use_true_random=False), st.integers(1, 9))
@unhurried
def test_the_order_and_the_blocks_of_rows_do_not_matter(rows: list[Lineage], order: random.Random, block: int):
    rows = rows + TWO_KINGDOMS
    space = LabelSpace.build([as_table(rows)])
    order.shuffle(rows)
    again = LabelSpace.build(batch for batch in as_text(rows).to_batches(max_chunksize=block))
    assert again.sha256 == space.sha256
    assert (again.names, again.conflicts, again.version) == (space.names, space.conflicts, space.version)
    for left, right in zip((*space.paths, *space.counts), (*again.paths, *again.counts), strict=True):
        np.testing.assert_array_equal(left, right)


@given(lineages)
@unhurried
def test_a_saved_space_is_the_same_when_loaded(tmp_path_factory: pytest.TempPathFactory, rows: list[Lineage]):
    space = LabelSpace.build([as_table(rows + TWO_KINGDOMS)])
    path = tmp_path_factory.mktemp("labels") / "deep" / "space.json"
    space.save(path)
    assert os.listdir(path.parent) == ["space.json"]
    again = LabelSpace.load(path)
    assert (again.names, again.conflicts, again.version, again.sha256) == (
        space.names,
        space.conflicts,
        space.version,
        space.sha256,
    )
    for left, right in zip((*space.paths, *space.counts), (*again.paths, *again.counts), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_a_conflict_goes_to_the_majority_and_is_reported():
    rows = [
        *[("Animalia", None, None, None, "Faa", "Ga", "Ga a")] * 2,
        *[("Animalia", None, None, None, "Fbb", "Ga", "Ga b")] * 3,
        ("Animalia", None, None, None, "Fcc", "Ga", None),
        ("Animalia", None, None, None, "Fcc", "Gb", None),
    ]
    space = LabelSpace.build([as_table(rows)])
    assert space.conflicts == (Conflict("genus", "Ga", "family", (("Fbb", 3), ("Faa", 2), ("Fcc", 1)), "Fbb"),)
    assert space.names[4] == ("Fbb", "Fcc"), "Faa has no row left"
    assert space.counts[4].tolist() == [6, 1]
    encoded = [in_names(space, path) for path in space.encode(read_lineages(as_table(rows)))]
    assert encoded[0] == ("Animalia", None, None, None, "Fbb", "Ga", "Ga a")
    assert encoded[5] == ("Animalia", None, None, None, "Fbb", "Ga", None)


def test_a_tied_conflict_goes_to_the_first_name():
    rows = [("Kb", "Pa", *[None] * 5), ("Ka", "Pa", *[None] * 5)]
    space = LabelSpace.build([as_table(rows + TWO_KINGDOMS)])
    assert space.conflicts == (Conflict("phylum", "Pa", "kingdom", (("Ka", 1), ("Kb", 1)), "Ka"),)
    assert space.names[0] == ("Ka", "Xa", "Xb")


def test_gaps_stay_gaps_and_the_tree_fills_in_what_other_rows_know():
    rows = [
        ("Ka", None, None, "Oa", None, None, "Ga a"),
        ("Ka", None, None, "Oa", None, "Gb", "Gb b"),
        (None, None, None, None, None, None, "Gb b"),
        ("Ka", "Pa", None, None, None, None, None),
    ]
    space = LabelSpace.build([as_table(rows)])
    assert space.conflicts == ()
    assert [in_names(space, path) for path in space.encode(read_lineages(as_table(rows)))] == [
        rows[0],
        rows[1],
        rows[1],
        rows[3],
    ]
    assert space.parents[6].tolist() == [-1, 0]
    assert space.parents[5].tolist() == [-1]
    assert [in_names(space, path) for path in space.leaf_paths()] == [rows[3], rows[0], rows[1]]


def test_the_hash_depends_on_names_and_tree_but_not_on_counts():
    rows = [("Ka", "Pa", *[None] * 5), ("Kb", "Pb", *[None] * 5)]
    space = LabelSpace.build([as_table(rows)])
    assert LabelSpace.build([as_table(rows * 2)]).sha256 == space.sha256
    crossed = [("Kb", "Pa", *[None] * 5), ("Ka", "Pb", *[None] * 5)]
    assert LabelSpace.build([as_table(crossed)]).sha256 != space.sha256
    assert LabelSpace.build([as_table([*rows, ("Kc", *[None] * 6)])]).sha256 != space.sha256


def test_simulated_barcodes_give_back_their_tree():
    table = simulate(species=40, per_species=3, length=60, seed=1)
    space = LabelSpace.build(table.to_batches(max_chunksize=7))
    assert len(space.names[6]) == len(space.leaf_paths()) == 40
    assert space.counts[6].tolist() == [3] * 40
    encoded = space.encode(read_lineages(table))
    assert encoded.dtype == np.int32
    assert [in_names(space, path) for path in encoded] == list(
        zip(*(table[rank].to_pylist() for rank in RANKS), strict=True)
    )


def test_many_lineages_in_many_blocks_are_merged_while_counting(monkeypatch: pytest.MonkeyPatch):
    table = simulate(species=40, per_species=3, length=60, seed=1)
    whole = LabelSpace.build([table])
    monkeypatch.setattr("bioscan_jax.barcodes.labels._PENDING_LINEAGES", 10)
    merged = LabelSpace.build(table.to_batches(max_chunksize=7))
    assert merged.sha256 == whole.sha256
    assert [counts.tolist() for counts in merged.counts] == [counts.tolist() for counts in whole.counts]


def test_rows_without_anything_to_learn_are_refused():
    with pytest.raises(InputError, match="no labelled rows.*--data.path"):
        LabelSpace.build([])
    with pytest.raises(InputError, match="no labelled rows"):
        LabelSpace.build([as_table([])])
    with pytest.raises(InputError, match="none of the 3 rows has a known name.*'taxonomy'"):
        LabelSpace.build([as_table([(None,) * 7, ("unknown",) * 7]), as_text([(None,) * 7])])
    with pytest.raises(InputError, match="all labelled rows are Ka;;Ca;;;;, .*add rows"):
        LabelSpace.build([as_table([("Ka", None, "Ca", *[None] * 4), (None,) * 7])])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    LabelSpace.build([as_table([("Ka", "Pa", *[None] * 5), ("Kb", "Pa", *[None] * 5), *TWO_KINGDOMS])]).save(
        tmp_path / "space.json"
    )
    return tmp_path / "space.json"


def test_a_damaged_file_is_refused_wherever_the_damage_is(saved: Path):
    whole = saved.read_bytes()
    for at in range(0, len(whole), 3):
        saved.write_bytes(whole[:at])
        with pytest.raises(InputError, match=r"space\.json is not a label space"):
            LabelSpace.load(saved)
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"space\.json (is not a label space|does not match its checksum)"):
            LabelSpace.load(saved)


@pytest.mark.parametrize("text", ["[]", "{}", "1", "null", '"a"', "[" * 100_000])
def test_another_json_file_is_refused(tmp_path: Path, text: str):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"other\.json is not a label space"):
        LabelSpace.load(tmp_path / "other.json")


def test_another_version_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bioscan_jax.barcodes.labels._VERSION", 2)
    with pytest.raises(InputError, match=r"space\.json has version 1, .* 2"):
        LabelSpace.load(saved)


def test_an_edited_count_is_noticed(saved: Path):
    content = json.loads(saved.read_bytes())
    content["counts"][0][0] += 1
    saved.write_text(json.dumps(content))
    with pytest.raises(InputError, match="does not match its checksum"):
        LabelSpace.load(saved)


def test_a_path_that_cannot_be_read_or_written_is_named(saved: Path):
    with pytest.raises(InputError, match=r"the label space .*missing\.json cannot be read: No such file"):
        LabelSpace.load(saved.parent / "missing.json")
    with pytest.raises(InputError, match=r"the label space .*space\.json/deep\.json cannot be written: "):
        LabelSpace.load(saved).save(saved / "deep.json")
    with pytest.raises(InputError, match=r"the label space .* cannot be written: Is a directory"):
        LabelSpace.load(saved).save(saved.parent)
    assert os.listdir(saved.parent) == ["space.json"]
