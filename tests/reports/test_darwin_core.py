"""Darwin Core archives: what the queries and the answers say is what a reader of such archives gets."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dwca.read import DwCAReader
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.config import ArchiveConfig, DataConfig
from bioscan_jax.data.parquet import open_source
from bioscan_jax.errors import InputError
from bioscan_jax.matching.answers import ANSWERS
from bioscan_jax.reports import darwin_core
from bioscan_jax.reports.darwin_core import Method, read_taxon_ids, write_archive

TUNA = ("Animalia", "Chordata", "Actinopterygii", "Perciformes", "Scombridae", "Sarda", "Sarda sarda")
HOW = {"software": "bioscan_jax 9", "model": "tiny", "reference": "db, 5 sequences", "how": "vote of 5"}
DWC, DNA = "http://rs.tdwg.org/dwc/terms/", "https://w3id.org/mixs/"


def answer(name: str, names=TUNA, **more) -> dict:
    row = dict.fromkeys(ANSWERS.names) | {"sequence_id": name, **dict(zip(RANKS, names, strict=True))}
    row |= {f"{rank}_confidence": 1 - i / 10 for i, rank in enumerate(RANKS)}
    row |= {"nearest_id": "ref 1", "identity": 0.95, "overlap": 12345, "similarity": 0.9, "strand": "+"}
    return row | {"novelty": 0.1, "novel": False} | more


def archive(directory: Path, columns: dict, answers: list[dict] | None = None, ids=None, rejects=None, **described):
    """Writes an archive and reads it; returns its core rows by id, those of the extension, and the notes."""
    rows = len(next(iter(columns.values())))
    columns = {"sequence_id": [f"q{i}" for i in range(rows)], "dna_sequence": ["ACGT"] * rows} | columns
    pq.write_table(pa.table(columns), directory / "q.parquet")
    queries = open_source(DataConfig(path=str(directory / "q.parquet"), block_rows=2), scratch=None)
    given_answers = answers or [answer(name) for name in columns["sequence_id"]]
    table = pa.Table.from_pylist(given_answers, ANSWERS)
    method = Method(**HOW, calibrated=True)
    path = directory / "names.dwca.zip"
    notes = write_archive(path, table, queries, rejects or {}, method, ArchiveConfig(**described), ids)
    core, dna = {}, {}
    with DwCAReader(str(path)) as reader:
        assert reader.core_contains_term(DWC + "basisOfRecord")
        assert reader.descriptor.core.type == DWC + "Occurrence"
        for row in reader:
            core[row.id] = {term.removeprefix(DWC): value for term, value in row.data.items()}
            (extension,) = row.extensions
            assert extension.rowtype == "http://rs.gbif.org/terms/1.0/DNADerivedData"
            dna[row.id] = extension.data
        assert not any(reader.orphaned_extension_rows().values())
        metadata = reader.metadata
    return core, dna, notes, metadata


def test_names_stop_at_the_lowest_accepted_rank_and_nothing_is_lost(tmp_path):
    answers = [
        answer("q0"),
        answer("q1", abstained_at="genus"),
        answer("q2", (*TUNA[:4], None, None, None), abstained_at="species"),
        answer("q3", abstained_at="kingdom"),
        dict.fromkeys(ANSWERS.names) | {"sequence_id": "q4"},
        answer("q5", novel=True, novelty=0.75, strand="-"),
        answer("q6", [None] * 7, unnamed="overlap", **{f"{rank}_confidence": None for rank in RANKS}),
    ]
    sequences = ["ACGT", "AC", "GG", "TT", "AC?T", "CC", "AA"]
    core, dna, notes, _ = archive(tmp_path, {"dna_sequence": sequences}, answers, rejects={4: "not_dna ('?' at 3)"})
    assert list(core) == [f"q{i}" for i in range(7)]
    assert [(row["scientificName"], row["taxonRank"]) for row in core.values()] == [
        ("Sarda sarda", "species"),
        ("Scombridae", "family"),
        ("Perciformes", "order"),
        ("incertae sedis", ""),
        ("incertae sedis", ""),
        ("Sarda sarda", "species"),
        ("incertae sedis", ""),
    ]
    assert [core["q0"][rank] for rank in RANKS[:-1]] == list(TUNA[:-1])
    assert core["q0"]["specificEpithet"] == "sarda"
    assert [core["q1"][name] for name in ("family", "genus", "specificEpithet")] == ["Scombridae", "", ""]
    assert {row["basisOfRecord"] for row in core.values()} == {"MaterialSample"}
    assert all(row["occurrenceID"] and row["scientificName"] for row in core.values())
    remarks = {name: row["identificationRemarks"] for name, row in core.items()}
    assert "bioscan_jax 9 confidence (at species): 0.4000, a calibrated probability" in remarks["q0"]
    assert (
        "against reference database: db, 5 sequences; nearest reference ref 1, identity 0.9500, overlap 12345, "
        in remarks["q0"]
    )
    assert "not accepted: genus Sarda (0.5000), species Sarda sarda (0.4000)" in remarks["q1"]
    assert remarks["q3"].startswith("no name: none of the ranks is accepted")
    assert "not accepted: kingdom Animalia (1.0000), " in remarks["q3"]
    assert remarks["q4"] == "no name: the sequence was not compared with the reference: not_dna ('?' at 3)"
    assert remarks["q6"].startswith("no name: the overlap with the nearest reference is below its floor; against")
    assert "similarity 0.9000, on the reverse strand;" in remarks["q5"]
    assert "reverse" not in remarks["q0"]
    assert "probably a species that the reference lacks (novelty 0.7500)" in remarks["q5"]
    assert core["q3"]["scientificNameID"] == "urn:lsid:marinespecies.org:taxname:12"
    assert [row["http://rs.gbif.org/terms/dna_sequence"] for row in dna.values()] == sequences
    assert dna["q0"][DNA + "0000087"] == "db, 5 sequences"
    assert "3 of 7 occurrences have no name" in notes[0]
    assert "7 of 7 occurrences have no eventDate, which GBIF requires" in notes[1]


def test_columns_of_the_queries_become_terms_and_the_others_stay_too(tmp_path):
    columns = {
        "latitude": [1.5, None],
        "lon": [-2.25, float("nan")],
        "depth": [10, 20],
        "collection_date": ["2020-01-02", None],
        "marker_code": ["COI-5P", "16S"],
        "size": [12, 0],
        "eventID": ["e1", "e2"],
        "CountryCode": ["NA", None],
        "pcr_primer_forward": ["ACGT", None],
        "family": ["Labridae", None],
        "plate": ["0002", None],
        "note": ['a\t"b"\nc', "é"],
        "image": [b"\x00", None],
    }
    core, dna, notes, _ = archive(tmp_path, columns)
    expected = {"decimalLatitude": "1.5", "decimalLongitude": "-2.25", "minimumDepthInMeters": "10"}
    expected |= {"maximumDepthInMeters": "10", "eventDate": "2020-01-02", "eventID": "e1", "countryCode": "NA"}
    expected |= {"organismQuantity": "12", "organismQuantityType": "DNA sequence reads", "occurrenceStatus": "present"}
    assert expected.items() <= core["q0"].items()
    assert core["q0"]["family"] == "Scombridae"
    assert json.loads(core["q0"]["dynamicProperties"]) == {
        "family": "Labridae",
        "plate": "0002",
        "note": 'a\t"b"\nc',
    }
    assert json.loads(core["q1"]["dynamicProperties"]) == {"note": "é"}
    assert [core["q1"][term] for term in ("decimalLatitude", "decimalLongitude", "eventDate", "countryCode")] == [
        ""
    ] * 4
    assert core["q1"]["occurrenceStatus"] == "absent"
    assert dna["q0"][DNA + "0000044"] == "COI-5P"
    assert dna["q0"]["http://rs.gbif.org/terms/pcr_primer_forward"] == "ACGT"
    assert any(note == "not in the archive: image (binary)" for note in notes)


def test_a_term_of_the_user_s_own_goes_before_ours(tmp_path):
    columns = {"basisOfRecord": ["PreservedSpecimen"], "organismQuantity": [3], "size": [9], "lat": [1.0]}
    columns |= {"decimalLatitude": [2.0], "decimalLongitude": [3.0], "target_gene": ["18S"], "marker_gene": ["COI"]}
    columns |= {"minimumDepthInMeters": [5.0], "depth": [7.0], "eventDate": [pa.scalar(18000, pa.date32()).as_py()]}
    core, dna, _, _ = archive(tmp_path, columns)
    expected = {"basisOfRecord": "PreservedSpecimen", "organismQuantity": "3", "decimalLatitude": "2"}
    assert (expected | {"minimumDepthInMeters": "5", "eventDate": "2019-04-14"}).items() <= core["q0"].items()
    assert dna["q0"][DNA + "0000044"] == "18S"
    rest = json.loads(core["q0"]["dynamicProperties"])
    assert rest == {"size": 9, "lat": 1.0, "marker_gene": "COI", "depth": 7.0}


def test_latitude_and_longitude_in_one_column_are_split(tmp_path):
    core, _, _, _ = archive(tmp_path, {"coord": ["[44.5, -80.25]", "44.5 N 80.25 W", "near the mill"]})
    places = [(row["decimalLatitude"], row["decimalLongitude"], row["verbatimCoordinates"]) for row in core.values()]
    assert places == [
        ("44.5", "-80.25", "[44.5, -80.25]"),
        ("44.5", "-80.25", "44.5 N 80.25 W"),
        ("", "", "near the mill"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,AphiaID\nSarda sarda,127021\n", ("", "urn:lsid:marinespecies.org:taxname:127021")),
        ("scientificName\tscientificNameID\nSarda sarda\turn:lsid:x:1\n", ("", "urn:lsid:x:1")),
        ("taxon;id\nSarda sarda;007\n", ("007", "")),
        (
            "id,name\nurn:lsid:marinespecies.org:taxname:5,Sarda sarda\n",
            ("", "urn:lsid:marinespecies.org:taxname:5"),
        ),
        (
            "ScientificName,usageKey,lsid\nSarda sarda,2374149,urn:lsid:marinespecies.org:taxname:5\n",
            ("https://www.gbif.org/species/2374149", "urn:lsid:marinespecies.org:taxname:5"),
        ),
    ],
)
def test_taxon_ids_come_from_a_table(tmp_path, text, expected):
    (tmp_path / "ids.csv").write_text(text)
    ids = read_taxon_ids(str(tmp_path / "ids.csv"))
    answers = [answer("q0"), answer("q1", abstained_at="family"), answer("q2", abstained_at="kingdom")]
    core, _, notes, _ = archive(tmp_path, {"n": [1, 2, 3]}, answers, ids)
    assert (core["q0"]["taxonID"], core["q0"]["scientificNameID"]) == expected
    assert (core["q1"]["taxonID"], core["q1"]["scientificNameID"]) == ("", "")
    assert "1 names without a taxon id: Perciformes" in notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name,AphiaID\nSarda,1\nThunnus,2\nSarda,3\n",
            r"ids.csv line 4: 'Sarda' has the ids .*:1' and .*:3'; keep one",
        ),
        ("genus,AphiaID\nSarda,1\n", "ids.csv has no column of names .* the columns are 'genus', 'AphiaID'"),
        ("name,depth\nSarda,1\n", "ids.csv has no column of ids"),
        ("name,AphiaID,AphiaID\nSarda,1,2\n", "ids.csv has the column 'AphiaID' twice"),
    ],
)
def test_a_table_of_taxon_ids_that_does_not_fit_is_one_line(tmp_path, text, words):
    (tmp_path / "ids.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_taxon_ids(str(tmp_path / "ids.csv"))


def test_taxon_ids_of_parquet_are_text_or_numbers(tmp_path):
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"name": ["Sarda", None, "Thunnus"], "AphiaID": [5.0, 6.0, None]}), path)
    assert read_taxon_ids(str(path))["scientificNameID"] == {"Sarda": "urn:lsid:marinespecies.org:taxname:5"}
    pq.write_table(pa.table({"name": [b"\xff"], "AphiaID": [5]}), path)
    with pytest.raises(InputError, match="column 'name' is binary; make it text"):
        read_taxon_ids(str(path))


def test_the_metadata_says_what_it_was_told_and_asks_for_the_rest(tmp_path):
    _, _, notes, eml = archive(tmp_path, {"n": [1]})
    assert "--title, --email, --license, --creator or --organization, and an abstract" in notes[-1]
    assert eml.findtext("dataset/creator/organizationName") == "not stated"
    stated = {"title": "Fish & <co>", "creator": "Ada King Lovelace", "email": "a@b.c", "license": "CC-BY-4.0"}
    _, _, notes, eml = archive(tmp_path, {"n": [1]}, **stated)
    assert notes[-1] == "eml.xml still needs an abstract before it is published"
    assert eml.findtext("dataset/title") == "Fish & <co>"
    order = [child.tag for child in eml.find("dataset")]
    assert order == ["title", "creator", "metadataProvider", "intellectualRights", "contact", "methods"]
    for role in ("creator", "metadataProvider", "contact"):
        party = eml.find(f"dataset/{role}")
        assert [element.text for element in party.iter() if element.text.strip()] == ["Ada King", "Lovelace", "a@b.c"]
    assert eml.find(".//ulink").get("url") == "http://creativecommons.org/licenses/by/4.0/legalcode"


def test_equal_input_gives_equal_bytes(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        archive(tmp_path / name, {"n": [1, 2, 3]})
        made.append((tmp_path / name / "names.dwca.zip").read_bytes())
    assert made[0] == made[1]


def test_every_term_has_its_uri_and_none_is_twice():
    assert len(set(darwin_core._OWN_CORE)) == len(darwin_core._OWN_CORE)
    assert len(set(darwin_core._DNA.values())) == len(darwin_core._DNA)
    assert not set(darwin_core._OWN_CORE) & {"scientificName", "dynamicProperties", "identificationRemarks", *RANKS}
    assert darwin_core._DNA["target_gene"] == DNA + "0000044"


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12), min_size=1))
def test_any_text_is_read_back_with_its_breaks_as_blanks(texts, tmp_path_factory):
    core, _, _, _ = archive(tmp_path_factory.mktemp("any"), {"locality": texts, "other": texts})
    for row, text in zip(core.values(), texts, strict=True):
        assert row["locality"].split() == text.translate(dict.fromkeys(range(32), " ")).split()
        kept = json.loads(row["dynamicProperties"])["other"]
        assert kept.split() == text.split()
