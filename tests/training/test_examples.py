"""Rows of a labelled table, prepared for random access."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.data.parquet import open_source
from bioscan_jax.errors import InputError
from bioscan_jax.training.examples import _BLOCK_ROWS, prepare_examples

V2 = Vocabulary.published("v2")
LINEAGES = [
    "Animalia;Arthropoda;Insecta;Diptera;Culicidae;Aedes;Aedes vexans",
    "Animalia;Arthropoda;Insecta;Diptera;Culicidae;Aedes;",
    "Animalia;Arthropoda;Insecta;Diptera;Culicidae;Culex;Culex pipiens",
    ";;;;;;",
]


def barcodes(rows, seed=0):
    letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(seed).integers(0, 4, (rows, 60))]
    return [row.tobytes().decode() for row in letters]


def write(path, rows=40, **columns):
    table = {
        "sequence_id": [f"s{i}" for i in range(rows)],
        "dna_sequence": barcodes(rows),
        "taxonomy": [LINEAGES[i % 4] for i in range(rows)],
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=7)
    return path


def prepare(path, scratch, *, labelled=True, with_metadata=False, **wanted):
    source = open_source(config.DataConfig(path=str(path)), scratch=None)
    examples = config.ExamplesConfig(path=str(path), **wanted)
    return prepare_examples(source, examples, V2, scratch, labelled=labelled, with_metadata=with_metadata)


def test_rows_come_back_with_their_labels(tmp_path, caplog):
    sequences = barcodes(40)
    sequences[5] = "NNNN"
    sequences[6] = sequences[6].lower().replace("t", "u") + "--"
    path = write(tmp_path / "b.parquet", dna_sequence=sequences)
    found = prepare(path, tmp_path, validation=0.3)
    assert [s.decode() for s in found.sequences(np.array([6, 0, 39]))] == [barcodes(40)[i] for i in (6, 0, 39)]
    assert found.splits[5] == -1 and found.sequences(np.array([5])) == [b""]  # noqa: PT018
    train, validation = found.rows("train"), found.rows("validation")
    assert len(train) and len(validation) and not set(train) & set(validation)  # noqa: PT018
    assert not any(i % 4 == 3 for i in [*train, *validation])  # rows without any label are not used
    names = found.space.names
    species = found.labels[0, RANKS.index("species")]
    assert names[6][species] == "Aedes vexans"
    assert found.labels[1, 6] == -1
    assert names[5][found.labels[1, 5]] == "Aedes"
    assert found.tokens.tolist()[0] == 11
    assert found.metadata is None
    assert "11 of 40 rows are left out: 1 without usable DNA, 10 without a name that a training row has" in caplog.text


def test_the_label_space_is_of_the_training_rows(tmp_path):
    lineages = (
        [LINEAGES[0]] * 20 + [LINEAGES[2]] * 19 + ["Animalia;Arthropoda;Insecta;Diptera;Culicidae;Culex;Culex ater"]
    )
    sides = ["train"] * 39 + ["validation"]
    found = prepare(write(tmp_path / "b.parquet", taxonomy=lineages, split=sides), tmp_path, split_column="split")
    assert "Culex ater" not in found.space.names[6]
    assert found.labels[39, 6] == -1
    assert found.space.names[5][found.labels[39, 5]] == "Culex"
    assert found.rows("validation").tolist() == [39]


def test_held_out_species_are_in_no_training_row(tmp_path):
    lineages = [f"Animalia;Arthropoda;Insecta;Diptera;Culicidae;Aedes;Aedes s{chr(97 + i % 20)}us" for i in range(40)]
    path = write(tmp_path / "b.parquet", taxonomy=lineages)
    found = prepare(path, tmp_path, split="held_out_species", validation=0.4)
    sides = {lineage: set() for lineage in lineages}
    for lineage, side in zip(lineages, found.splits.tolist(), strict=True):
        sides[lineage].add(side)
    assert all(len(of) == 1 for of in sides.values())
    assert {1} in sides.values()
    assert (found.labels[found.rows("validation"), 6] == -1).all()


def test_metadata_and_no_labels(tmp_path):
    columns = {"depth": pa.array([None] * 40, pa.float64()), "latitude": [1.5] * 40, "longitude": [2.0] * 40}
    path = write(tmp_path / "b.parquet", **columns)
    found = prepare(path, tmp_path, labelled=False, with_metadata=True)
    np.testing.assert_array_equal(found.metadata[3], np.array([np.nan, 1.5, 2.0], np.float32))
    assert found.space is None
    assert len(found.rows("train")) + len(found.rows("validation")) == 40


@pytest.mark.parametrize(
    ("columns", "wanted", "line"),
    [
        ({"taxonomy": [";;;;;;"] * 40}, {}, "none of the .* rows has a known name at any rank"),
        ({"taxonomy": [LINEAGES[0]] * 40}, {}, "all labelled rows are Animalia;.*add rows"),
        ({"taxonomy": pa.array([1] * 40)}, {}, "column 'taxonomy' has the Arrow type int64"),
        ({"dna_sequence": ["ACGTACGTAA"] * 40, "split": ["train", "test"] * 20}, {"split_column": "split"}, "same seq"),
        ({"split": ["train", "tset"] * 20}, {"split_column": "split"}, r"b\.parquet row 1 has the split 'tset'"),
        ({}, {"split_column": "side"}, "has no column 'side'"),
        ({"split": ["test"] * 40}, {"split_column": "split"}, "no labelled rows"),
        ({}, {"validation": 0.7, "test": 0.3}, "must be at least 0 and together less than 1"),
    ],
)
def test_bad_input(tmp_path, columns, wanted, line):
    with pytest.raises(InputError, match=line):
        prepare(write(tmp_path / "b.parquet", **columns), tmp_path, **wanted)


def test_missing_labels_and_wrong_metadata(tmp_path):
    table = pa.table({"sequence_id": ["a", "b"], "dna_sequence": ["ACGT", "CCGT"]})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no labels: there is neither a column 'taxonomy'"):
        prepare(tmp_path / "b.parquet", tmp_path)
    with pytest.raises(InputError, match="there is no column depth"):
        prepare(tmp_path / "b.parquet", tmp_path, labelled=False, with_metadata=True)
    columns = {"depth": [5.0] * 40, "latitude": [1.5] * 39 + [400.0], "longitude": [2.0] * 40}
    path = write(tmp_path / "c.parquet", **columns)
    with pytest.raises(InputError, match=r"the latitude 400 of .*c\.parquet row 39 is outside -90 to 90"):
        prepare(path, tmp_path, with_metadata=True)


def test_messages_name_the_file_and_row_beyond_the_first_block(tmp_path):
    rows = _BLOCK_ROWS + 20
    numbers = {"depth": [5.0] * rows, "latitude": [1.5] * rows, "longitude": [2.0] * rows}
    sides = ["train", "validation"] * (rows // 2)
    sides[-1], numbers["latitude"][-2] = "tset", 400.0
    write(tmp_path / "in-1.parquet", rows=40, split=sides[:40], **{name: v[:40] for name, v in numbers.items()})
    write(tmp_path / "in-2.parquet", rows=rows, split=sides, **numbers)
    path = tmp_path / "in-*.parquet"
    with pytest.raises(InputError, match=rf"in-2\.parquet row {rows - 1} has the split 'tset'"):
        prepare(path, tmp_path, split_column="split")
    with pytest.raises(InputError, match=rf"the latitude 400 of .*in-2\.parquet row {rows - 2} is outside"):
        prepare(path, tmp_path, with_metadata=True)


def bioscan_5m(path, rows=40, **columns):
    """A table with the columns of BIOSCAN-5M's published metadata."""
    names = [lineage.split(";") for lineage in LINEAGES[:3]]
    table = {"processid": [f"P{i}" for i in range(rows)], "dna_barcode": barcodes(rows)}
    table |= {rank: [names[i % 3][1 + k] or None for i in range(rows)] for k, rank in enumerate(RANKS[1:])}
    table |= {"coord-lat": [45.0 + i for i in range(rows)], "coord-lon": [-80.0] * rows, "taxon": ["Aedes"] * rows}
    pq.write_table(pa.table(table | columns), path)
    return path


def test_bioscan_5m_trains_with_no_flag_but_the_path(tmp_path, caplog):
    caplog.set_level("INFO", "bioscan_jax")
    sides = ["train", "pretrain", "val", "test_unseen", "key_unseen"] * 8
    path = bioscan_5m(tmp_path / "m.parquet", split=sides)
    found = prepare(path, tmp_path)
    assert [rank[0] for rank in found.space.names[:2]] == ["Animalia", "Arthropoda"]
    assert found.space.names[6] == ("Aedes vexans", "Culex pipiens")
    assert "pass --data.split_column split" in caplog.text
    assert "there is no column for kingdom; the kingdom is that of the phylum" in caplog.text
    given = prepare(path, tmp_path, split_column="split")
    assert given.splits.tolist() == [0, 0, 1, 2, -1] * 8
    assert prepare(path, tmp_path, split="held_out_species", validation=0.4).space is not None


def test_coordinates_under_other_names(tmp_path):
    path = bioscan_5m(tmp_path / "m.parquet", minimumDepthInMeters=[float(i) for i in range(40)])
    found = prepare(path, tmp_path, with_metadata=True)
    assert found.metadata[3].tolist() == [3.0, 48.0, -80.0]
    path = write(tmp_path / "c.parquet", coord=["[48.5, -80]"] * 39 + [None], depth=[3.0] * 40)
    assert prepare(path, tmp_path, with_metadata=True).metadata[3].tolist() == [3.0, 48.5, -80.0]
    path = bioscan_5m(tmp_path / "m.parquet", depth=[-9999.0] * 40)
    with pytest.raises(InputError, match="the depth -9999 of"):
        prepare(path, tmp_path, with_metadata=True)


def test_folders_are_columns(tmp_path):
    for side, first in (("train", 0), ("test", 40)):
        (tmp_path / f"in/split={side}").mkdir(parents=True)
        some = {"dna_sequence": barcodes(40, seed=first), "sequence_id": [f"s{first + i}" for i in range(40)]}
        write(tmp_path / f"in/split={side}/part.parquet", **some)
    found = prepare(tmp_path / "in", tmp_path, split_column="split")
    assert found.splits.tolist() == [2] * 40 + [0] * 40


@pytest.mark.parametrize("split", ["random", "held_out_species"])
def test_a_lineage_that_cannot_be_read_names_file_and_row(tmp_path, split):
    lineages = [LINEAGES[i % 4] for i in range(40)]
    lineages[17] = "Animalia;Arthropoda"
    path = write(tmp_path / "b.parquet", taxonomy=lineages)
    with pytest.raises(
        InputError, match=r"b.parquet row 17 \(counted from 0\): the lineage 'Animalia;Arthropoda' has 2"
    ):
        prepare(path, tmp_path, split=split)


def test_no_labels_lists_the_columns_there_are(tmp_path):
    pq.write_table(pa.table({"dna_sequence": barcodes(4), "site": ["a"] * 4}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="the columns are: sequence_id, dna_sequence, site"):
        prepare(tmp_path / "b.parquet", tmp_path)


def test_a_rule_that_blanks_most_species_is_told(tmp_path, caplog):
    lineages = [
        f"Animalia;Arthropoda;Insecta;Diptera;Culicidae;{'Aedes' if i % 2 else 'Culex'};Aedes x{i}" for i in range(40)
    ]
    prepare(write(tmp_path / "b.parquet", taxonomy=lineages), tmp_path)
    assert "species: 40 of 40 names count as unknown" in caplog.text
