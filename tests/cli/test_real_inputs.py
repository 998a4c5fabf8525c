"""Files of real users from the file to the table and to answers; small inputs of each kind."""

import json
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax import config
from bioscan_jax.bundles.bundle import bundle
from bioscan_jax.bundles.merge import import_bundle
from bioscan_jax.embedding.run import embed
from bioscan_jax.embedding.summary import RunSummary
from bioscan_jax.errors import InputError
from bioscan_jax.matching.identify import identify
from bioscan_jax.matching.search import open_table, short_columns

TAXA = [("Sarda", "sarda"), ("Thunnus", "thynnus"), ("Gadus", "morhua")]


def barcodes(rows: int = 12) -> list[str]:
    """Three sequences, each with changes of one letter."""
    random = np.random.default_rng(0)
    parents = np.frombuffer(b"ACGT", np.uint8)[random.integers(0, 4, (3, 60))]
    made = []
    for row in range(rows):
        child = parents[row % 3].copy()
        child[row] = ord("A")
        made.append(child.tobytes().decode())
    return made


def run(tmp_path: Path, path: Path, **data) -> RunSummary:
    return embed(
        config.ModelConfig(checkpoint="random:tiny-v2"),
        config.DataConfig(path=str(path), **data),
        config.SinkConfig(uri=str(tmp_path / "db")),
        config.EmbedConfig(max_shapes=1, layer=0, phases=6),
        config.MeshConfig(data=1, compilation_cache=None),
        progress=False,
    )


def table(tmp_path: Path, name: str = "sequences") -> pa.Table:
    return lance.dataset(str(tmp_path / f"db/{name}.lance")).to_table()


def lineages(rows: int = 12) -> list[str]:
    return [f"k__Animalia; p__Chordata; c__; o__; f__; g__{TAXA[i % 3][0]}; s__{TAXA[i % 3][1]}" for i in range(rows)]


def write(path: Path, **columns) -> Path:
    pq.write_table(pa.table({"sequence_id": [f"s{i}" for i in range(12)], "dna_sequence": barcodes()} | columns), path)
    return path


def ask(tmp_path: Path, path: Path) -> pa.Table:
    settings = config.IdentifyConfig(k=3, rerank="none", search="exact")
    reference, query = config.ReferenceConfig(uri=str(tmp_path / "db")), config.QueryConfig(path=str(path))
    identify(reference, query, str(tmp_path / "answers.parquet"), settings, progress=False)
    return pq.read_table(tmp_path / "answers.parquet")


def test_bioscan_5m_is_embedded_and_identified_with_no_flag_but_the_path(tmp_path):
    ranks = {"phylum": ["Chordata"] * 12, "genus": [TAXA[i % 3][0] for i in range(12)]}
    ranks["species"] = [" ".join(TAXA[i % 3]) for i in range(12)]
    columns = {"processid": [f"P{i}" for i in range(12)], "taxon": ranks["species"], "dna_barcode": barcodes(), **ranks}
    pq.write_table(pa.table(columns | {"coord-lat": [1.5] * 12, "split": ["train"] * 12}), tmp_path / "m.parquet")
    run(tmp_path, tmp_path / "m.parquet")
    found = table(tmp_path)
    assert found.column_names == ["sequence_id", "source_row", "vector", *columns, "coord-lat", "split"]
    assert found["sequence_id"].to_pylist() == found["processid"].to_pylist()
    (tmp_path / "q.fasta").write_text("".join(f">q{i}\n{text}\n" for i, text in enumerate(barcodes()[:3])))
    answers = ask(tmp_path, tmp_path / "q.fasta")
    assert answers["species"].to_pylist() == ranks["species"][:3]
    assert answers["kingdom"].to_pylist() == ["Animalia"] * 3
    assert short_columns(open_table(str(tmp_path / "db"))) == ["sequence_id", "phylum", "genus", "species"]


def test_lineages_of_qiime_name_queries_whose_own_taxonomy_is_old(tmp_path, caplog):
    run(tmp_path, write(tmp_path / "t.parquet", taxonomy=lineages()))
    old = ["a;b", "Unassigned", "d__Eukaryota", None, ""] + ["k__Animalia"] * 7
    answers = ask(tmp_path, write(tmp_path / "q.parquet", taxonomy=old))
    assert answers["species"].to_pylist() == [" ".join(TAXA[i % 3]) for i in range(12)]
    assert answers["class"].to_pylist() == [None] * 12
    assert "q.parquet row 0 (counted from 0): the lineage 'a;b' cannot be read" in caplog.text


def test_labels_of_queries_that_are_not_text_are_noted_and_not_used(tmp_path, caplog):
    run(tmp_path, write(tmp_path / "t.parquet", taxonomy=lineages()))
    answers = ask(tmp_path, write(tmp_path / "q.parquet", taxonomy=list(range(12))))
    assert answers["genus"].to_pylist() == [TAXA[i % 3][0] for i in range(12)]
    assert caplog.text.count("the labels of the queries are not used") == 1


@pytest.mark.parametrize(
    "columns",
    [{"genus": ["a"] * 12, "Genus": ["b"] * 12}, {"Sequence_ID": ["a"] * 12}, {"VECTOR": [1] * 12}],
    ids=["two of the input", "our id", "our vector"],
)
def test_names_that_differ_in_case_alone_are_refused_before_the_model_is_loaded(tmp_path, columns, monkeypatch):
    monkeypatch.setattr("bioscan_jax.embedding.run.load_weights", None)
    with pytest.raises(InputError, match="differ only in case"):
        run(tmp_path, write(tmp_path / "t.parquet", **columns))
    assert not (tmp_path / "db/sequences.lance").exists()


def test_columns_called_like_results_are_kept_and_renamed_in_results_alone(tmp_path, caplog):
    own = {"query": ["x"] * 12, "similarity": [9.0] * 12, "confidence": [1] * 12, "_score": [0.5] * 12}
    summary = run(tmp_path, write(tmp_path / "t.parquet", **own))
    assert "query, similarity are kept" in caplog.text
    assert "query_in_table, similarity_in_table" in summary.notes[0]
    assert {name: table(tmp_path)[name].to_pylist() for name in own} == own
    opened = open_table(str(tmp_path / "db"))
    found = opened.search(barcodes()[0], k=2)
    assert found.column_names.count("query") == found.column_names.count("similarity") == 1
    assert found["similarity_in_table"].to_pylist() == [9.0, 9.0]
    assert found["similarity"][0].as_py() == pytest.approx(1, abs=1e-3)
    few = opened.search(barcodes()[0], k=1, columns=["sequence_id", "query"])
    assert few.column_names == ["query", "sequence_id", "query_in_table", "similarity", "strand"]


def test_lineages_with_a_wrong_number_of_ranks_are_warned_about_at_embed(tmp_path, caplog):
    given = lineages()
    given[4] = "Animalia;Chordata"
    summary = run(tmp_path, write(tmp_path / "t.parquet", taxonomy=given))
    (note,) = summary.notes
    assert f"1 of 12 rows have a lineage that cannot be read; {tmp_path}/t.parquet row 4 (counted from 0)" in note
    assert note in caplog.text
    assert note in str(summary)
    assert json.loads((tmp_path / "db/sequences.run.json").read_text())["notes"] == [note]


def test_hive_folders_and_abundances_reach_the_table(tmp_path):
    for marker in ("COI", "16S"):
        folder = tmp_path / f"in/marker_gene={marker}"
        folder.mkdir(parents=True)
        text = "".join(f">{marker}{i};size={i + 1};\n{letters}\n" for i, letters in enumerate(barcodes()[:3]))
        (folder / "part.fasta").write_text(text)
    run(tmp_path, tmp_path / "in")
    found = {row["sequence_id"]: (row["marker_gene"], row["size"]) for row in table(tmp_path).to_pylist()}
    assert found["COI0;size=1;"] == ("COI", 1)
    assert found["16S2;size=3;"] == ("16S", 3)
    bundle(str(tmp_path / "db"), str(tmp_path / "stick"), beside=[str(tmp_path / "in")], progress=False)
    import_bundle(str(tmp_path / "stick"), str(tmp_path / "copy"))
    copied = lance.dataset(str(tmp_path / "copy/sequences.lance")).to_table()
    assert {row["sequence_id"]: (row["marker_gene"], row["size"]) for row in copied.to_pylist()} == found
    assert (tmp_path / "copy/in/marker_gene=COI/part.fasta").is_file()


def test_a_final_star_is_trimmed_and_counted_and_rejects_say_which_character(tmp_path):
    given = barcodes()
    given[1], given[2], given[3] = given[1] + "*", given[2][:9] + "?" + given[2][10:], "MKVL*"
    summary = run(tmp_path, write(tmp_path / "t.parquet", dna_sequence=given))
    assert summary.counts.changes.stops_removed == 1
    assert "1 final '*'" in str(summary)
    rejects = table(tmp_path, "sequences_rejects").to_pylist()
    assert [(row["sequence_id"], row["detail"]) for row in rejects] == [
        ("s2", "'?' at position 10"),
        ("s3", "'L' at position 4"),
    ]


def test_a_numbered_table_is_resumed_and_another_way_of_ids_is_refused(tmp_path):
    (tmp_path / "x.fasta").write_text("".join(f">same\n{letters}\n" for letters in barcodes()))
    with pytest.raises(InputError, match="--data.id file_row"):
        run(tmp_path, tmp_path / "x.fasta")
    assert run(tmp_path, tmp_path / "x.fasta", id="file_row").vectors == 12
    assert run(tmp_path, tmp_path / "x.fasta", id="file_row").resumed_at == 12
    with pytest.raises(InputError):
        run(tmp_path, tmp_path / "x.fasta", id="header")
