import pytest

from bioscan_jax.barcodes.aliases import ALIASES, RANK_ROLES, describe_roles, find_column, find_roles

BIOSCAN_5M = [
    "processid",
    "sampleid",
    "taxon",
    "phylum",
    "class",
    "order",
    "family",
    "subfamily",
    "genus",
    "species",
    "dna_bin",
    "dna_barcode",
    "country",
    "province_state",
    "coord-lat",
    "coord-lon",
    "image_measurement_value",
    "area_fraction",
    "scale_factor",
    "inferred_ranks",
    "split",
    "index_bioscan_1M_insect",
    "chunk",
]
BCDM = [
    "processid",
    "sampleid",
    "bin_uri",
    "taxid",
    "kingdom",
    "phylum",
    "class",
    "order",
    "family",
    "subfamily",
    "genus",
    "species",
    "identification",
    "collection_date_start",
    "coord",
    "depth",
    "country/ocean",
    "marker_code",
    "nuc",
    "nuc_basecount",
    "insdc_acs",
]
DARWIN_CORE = [
    "gbifID",
    "occurrenceID",
    "basisOfRecord",
    "scientificName",
    "kingdom",
    "phylum",
    "class",
    "order",
    "family",
    "genus",
    "specificEpithet",
    "decimalLatitude",
    "decimalLongitude",
    "minimumDepthInMeters",
    "maximumDepthInMeters",
    "eventDate",
    "DNA_sequence",
    "target_gene",
]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            BIOSCAN_5M,
            {"sequence": "dna_barcode", "id": "processid", "latitude": "coord-lat", "longitude": "coord-lon"}
            | {"split": "split"}
            | {rank: rank for rank in RANK_ROLES[1:]},
        ),
        (
            BCDM,
            {"sequence": "nuc", "id": "processid", "marker": "marker_code", "date": "collection_date_start"}
            | {"depth": "depth", "coordinates": "coord"}
            | {rank: rank for rank in RANK_ROLES},
        ),
        (
            DARWIN_CORE,
            {"sequence": "DNA_sequence", "id": "occurrenceID", "latitude": "decimalLatitude", "marker": "target_gene"}
            | {"longitude": "decimalLongitude", "depth": "minimumDepthInMeters", "date": "eventDate"}
            | {rank: rank for rank in RANK_ROLES[:-1]}
            | {"species": "specificEpithet"},
        ),
        (["Feature ID", "Taxon", "Sequence"], {"id": "Feature ID", "lineage": "Taxon", "sequence": "Sequence"}),
        (["accession", "gtdb_taxonomy"], {"id": "accession", "lineage": "gtdb_taxonomy"}),
        (
            ["pr2_accession", "domain", "subdivision", "class", "species", "sequence"],
            {"id": "pr2_accession", "kingdom": "domain", "phylum": "subdivision", "class": "class"}
            | {"species": "species", "sequence": "sequence"},
        ),
        (["dna_sequence", "sequence_id", "nuc", "processid"], {"sequence": "dna_sequence", "id": "sequence_id"}),
        (["site", "remarks"], {}),
    ],
    ids=["BIOSCAN-5M", "BOLD", "Darwin Core", "QIIME 2", "GTDB", "PR2", "our own go first", "none"],
)
def test_columns_of_the_public_databases(columns, expected):
    assert find_roles(columns) == expected


def test_spelling_of_a_name_does_not_matter_but_the_exact_one_goes_first():
    assert find_column("latitude", ["DECIMAL_LATITUDE"]) == "DECIMAL_LATITUDE"
    assert find_column("id", ["ProcessId", "processid"]) == "processid"
    assert find_column("depth", ["DepthLog"]) is None


def test_no_name_has_two_roles():
    names = [name for roles in ALIASES.values() for found in roles.values() for name in found]
    assert len(names) == len(set(names))


def test_only_names_that_are_not_ours_are_told():
    assert describe_roles({"sequence": "nuc", "genus": "genus"}) == "sequence = nuc"
    assert describe_roles({"sequence": "dna_sequence"}) == ""
