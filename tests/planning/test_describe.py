import pyarrow as pa
import pyarrow.parquet as pq
from support.commands import call

from bioscan_jax.config import DataConfig
from bioscan_jax.planning.describe import describe


def test_what_a_table_holds(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table(
            {
                "processid": ["P1", "P2", "P2", "P3", "P4"],
                "nuc": ["ACGTACGT", "acgtacgt", "AC?XT", "ACG*", None],
                "phylum": ["Arthropoda"] * 5,
                "genus": ["Aedes", "Aedes", None, None, "Culex"],
                "species": ["aegypti", "Aedes sp.", None, None, "pipiens"],
                "coord-lat": [1.0] * 5,
                "Genus": ["x"] * 5,
            }
        ),
        path,
    )
    found = describe(DataConfig(path=str(path)))
    assert found.roles == {
        "sequence": "nuc",
        "id": "processid",
        "phylum": "phylum",
        "genus": "genus",
        "species": "species",
        "latitude": "coord-lat",
    }
    assert found.ranks == {"kingdom": 5, "phylum": 5, "class": 0, "order": 0, "family": 0, "genus": 3, "species": 2}
    assert found.rejects == {"not_dna": 1, "null": 1}
    assert found.first_rejects == {"not_dna": f"{path} row 2", "null": f"{path} row 4"}
    assert found.characters == {"?": 1, "X": 1}
    assert (found.repeated_ids, found.repeated_id, found.repeated_sequences) == (1, "P2", 1)
    assert (found.changes.lower_case, found.changes.stops_removed) == (8, 1)
    assert found.lengths == (3, 5, 8, 8, 8)
    assert any("embed refuses this: the columns 'genus' and 'Genus' differ" in line for line in found.warnings)

    printed = call("describe", path).stdout
    for words in ("sequence = nuc", "1 '?', 1 'X'", "Genus (string)", "embed refuses them"):
        assert words in printed


def test_lineages_in_a_dialect_and_those_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.parquet"
    lineages = ["k__Animalia;p__Chordata;g__Sarda;s__sarda", "a;b", None]
    pq.write_table(pa.table({"dna_sequence": ["ACGT", "AACC", "GGTT"], "taxonomy": lineages}), path)
    found = describe(DataConfig(path=str(path)))
    assert "strands  not determined: 3 of 3" in str(found)
    assert "lineage = taxonomy; no column of ids: they are made of file and row" in str(found).replace(
        ", sequence = dna_sequence", ""
    )
    assert "column taxonomy, in the dialect marked ranks" in found.lineage
    assert found.ranks["species"] == 1
    assert f"{path} row 1 (counted from 0): the lineage 'a;b'" in found.warnings[0]


def test_lineages_in_headers_are_told(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_text(">A|AB1|SH1.08FU|refs|k__Fungi;p__Ascomycota\nACGT\n>b tax=k:Fungi,p:Ascomycota;\nACGA\n")
    found = describe(DataConfig(path=str(path)))
    assert "the headers hold some (UNITE, SINTAX)" in found.lineage
    assert found.ranks == {}
