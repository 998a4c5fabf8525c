import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks import vsearch
from benchmarks.figures import describe, write_json, write_picture
from benchmarks.taxonomy import (
    accuracy,
    auroc,
    cluster_agreement,
    derive_splits,
    linear_probe,
    novelty,
    parse_model,
    read_labelled,
    resampled,
    six_mers,
    softmax_weights,
    stretches,
    taxonomy,
    vote,
)
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from support.commands import call

from bioscan_jax.barcodes.cleaning import reverse_complement
from bioscan_jax.errors import InputError
from bioscan_jax.matching.neighbours import exact_in_blocks, unit

module = importlib.import_module("benchmarks.taxonomy")  # benchmarks.taxonomy is the function


def dna(*texts: str) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


def codes(values: list) -> np.ndarray:
    return np.array(values, np.int32)


def test_six_mers_are_counted_at_every_position_without_n() -> None:
    counts = six_mers(dna("AAAAAAC", "ACG", "AAAAANAAAAAAT", ""))
    assert counts.shape == (4, 4096)
    assert (counts[0, 0], counts[0, 1], counts[0].sum()) == (1, 1, 2)
    assert counts[[1, 3]].sum() == 0
    assert (counts[2, 0], counts[2, 3], counts[2].sum()) == (1, 1, 2)


def test_six_mers_of_many_sequences_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTN"), size, p=[0.3, 0.2, 0.2, 0.29, 0.01])) for size in [700] * 800 + [3, 9]]
    together = six_mers(dna(*texts))
    for row in (0, 500, 799, 800, 801):
        np.testing.assert_array_equal(together[row], six_mers(dna(texts[row]))[0])


@pytest.mark.parametrize(
    ("taxa", "weights", "expected"),
    [
        ([1, 2, 2], [1, 1, 1], 2),
        ([1, 2, 2], [1, 0.4, 0.4], 1),
        ([3, 2, 2, 3], [1, 1, 1, 1], 3),
        ([-1, -1, 5], [1, 1, 0.1], 5),
        ([-1, -1], [1, 1], -1),
        ([4, 5], [0, 1], 5),
    ],
)
def test_the_taxon_with_most_weight_wins_and_of_equal_ones_the_nearest(
    taxa: list, weights: list, expected: int
) -> None:
    assert vote(codes([taxa]), np.array([weights], float)).tolist() == [expected]


def test_softmax_weights() -> None:
    found = softmax_weights(np.array([[0.9, 0.88, -np.inf], [-np.inf] * 3]), 0.02)
    np.testing.assert_allclose(found, [[1, np.exp(-1), 0], [0, 0, 0]])


def test_accuracy_by_hand() -> None:
    right = np.array([True, True, False, True, False, False])
    found = accuracy(right, codes([7, 7, 7, 3, 3, 9]), 400, seed=1)
    assert found["micro"] == 0.5
    assert found["macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, rel=1e-3)
    assert 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert 0 <= found["macro_low"] < found["macro"] < found["macro_high"] <= 1
    assert found == accuracy(right, codes([7, 7, 7, 3, 3, 9]), 400, seed=1)
    assert found != accuracy(right, codes([7, 7, 7, 3, 3, 9]), 400, seed=2)


def test_the_interval_of_a_fraction_is_that_of_the_binomial() -> None:
    right = np.arange(1000) < 300
    found = accuracy(right, codes([0] * 1000), 2000, seed=0)
    deviation = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found["low"] == pytest.approx(0.3 - deviation, abs=0.004)
    assert found["high"] == pytest.approx(0.3 + deviation, abs=0.004)


def test_resamples_are_the_same_for_a_seed_and_each_has_n_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLED", 35)
    blocks = list(resampled(10, 8, seed=5))
    assert [block.shape for block in blocks] == [(3, 10), (3, 10), (2, 10)]
    assert all((block.sum(axis=1) == 10).all() for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), np.concatenate(list(resampled(10, 8, seed=5))))


def test_auroc_is_that_of_scikit_learn_with_ties_and_counts() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 12, 60) / 10, rng.random(60) < 0.4
    counts = np.concatenate(list(resampled(60, 20, seed=0)))
    expected = [roc_auc_score(positive, score, sample_weight=row) for row in counts]
    np.testing.assert_allclose(auroc(score, positive, counts), expected)
    assert np.isnan(auroc(score, positive, np.where(positive, 1, 0)[None])).all()


def test_novelty_by_hand() -> None:
    similarity, novel = np.array([0.99, 0.9, 0.95, 0.7]), np.array([False, False, True, True])
    found = novelty(similarity, novel, 300, seed=0)
    assert found["area"] == 0.75
    assert 0 <= found["low"] <= 0.75 <= found["high"] == 1
    assert found == novelty(similarity, novel, 300, seed=0)


def taxa_of(*names: tuple[int, int]) -> np.ndarray:
    """Returns rows with these codes of genus and species."""
    found = np.zeros((len(names), 7), np.int32)
    found[:, 5:] = names
    return found


def test_splits_follow_from_the_names_of_the_reference() -> None:
    library = taxa_of((0, 0), (0, 1), (1, 2), (-1, -1))
    asked = taxa_of((0, 1), (1, 5), (2, 6), (2, -1), (0, -1), (-1, -1), (-1, 6))
    assert derive_splits(library, asked).tolist() == [0, 1, 2, 2, -1, -1, -1]


def test_stretches_are_seeded_parts_of_the_sequences() -> None:
    texts = dna("ACGTTGCAACCGGTTA" * 5, "ACGTACG", "T" * 30)
    found = stretches(texts, 20, seed=3).to_pylist()
    assert [len(text) for text in found] == [20, 7, 20]
    assert all(part in whole for part, whole in zip(found, texts.to_pylist(), strict=True))
    assert found == stretches(texts, 20, seed=3).to_pylist()
    assert found[0] != stretches(texts, 20, seed=4)[0].as_py()


def clustered(taxa: int, each: int, width: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(taxa, width))
    of = np.repeat(np.arange(taxa, dtype=np.int32), each)
    return (centres[of] + spread * rng.normal(size=(len(of), width))).astype(np.float32), of


@pytest.mark.parametrize("width", [12, 80])
def test_the_probe_names_as_ridge_classifier_does(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, of = clustered(6, 9, width, 1.2, seed=0)
    asked, _ = clustered(6, 40, width, 1.2, seed=1)
    monkeypatch.setattr(module, "_STRENGTHS", (0.01,))
    monkeypatch.setattr(module, "_BLOCK_ROWS", 17)
    scaled = unit(vectors)
    penalty = 0.01 * ((scaled - scaled.mean(axis=0)) ** 2).sum() / width
    expected = RidgeClassifier(alpha=penalty).fit(scaled, of).predict(unit(asked))
    # An unnamed reference is left out.
    given = np.concatenate([vectors, vectors[:1]]), np.append(of, np.int32(-1))
    np.testing.assert_array_equal(linear_probe(*given, asked, seed=0), expected)


def test_the_probe_chooses_its_penalty_by_held_out_vectors() -> None:
    vectors, of = clustered(20, 4, 60, 0.8, seed=0)
    asked, truth = clustered(20, 10, 60, 0.8, seed=1)
    assert (linear_probe(vectors, 10 + of, asked, seed=0) == 10 + truth).mean() > 0.8


def test_clusters_of_distinct_groups_agree_with_their_names() -> None:
    vectors, of = clustered(5, 8, 10, 0.05, seed=0)
    taxa = np.stack([of] * 7, axis=1)
    taxa[:3, 6] = -1
    assert cluster_agreement(vectors, taxa, seed=0) == {"genus": 1.0, "species": 1.0}
    taxa[:, 5] = 4
    assert cluster_agreement(vectors, taxa, seed=0) == {"species": 1.0}
    assert cluster_agreement(vectors[:2], taxa[:2], seed=0) == {}


def test_neighbours_in_blocks_are_those_of_one_product() -> None:
    rng = np.random.default_rng(0)
    asked, rows = (rng.normal(size=(n, 6)).astype(np.float32) for n in (5, 40))
    blocks = [(np.arange(a, min(a + 15, 40)), unit(rows[a : a + 15])) for a in range(0, 40, 15)]
    found = exact_in_blocks(asked, blocks, 3)
    similarity = unit(asked) @ unit(rows).T
    np.testing.assert_array_equal(found.rows, np.argsort(-similarity, axis=1)[:, :3])


def test_hits_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "hits.tsv").write_text("2\t7\t99.5\n0\t4\t90.0\n2\t1\t80.0\n2\t3\t79.0\n")
    found = vsearch.read_hits(tmp_path / "hits.tsv", 3, hits=2)
    assert found.rows.tolist() == [[4, -1], [-1, -1], [7, 1]]
    np.testing.assert_allclose(found.similarity, [[0.9, -np.inf], [-np.inf] * 2, [0.995, 0.8]], rtol=1e-6)


def test_settings_of_a_model_follow_plus_signs() -> None:
    expected = "dir/a+b", {"revision": "x", "seed": 3}, {"layer": -1, "strand": "both"}
    assert parse_model("dir/a+b+layer=-1+strand=both+revision=x+seed=3") == expected
    assert parse_model("6mer+strand=both") == ("6mer", {}, {"strand": "both"})
    with pytest.raises(InputError, match="6mer has no setting 'layer'; its settings are strand"):
        parse_model("6mer+layer=0")
    for name, message in (
        ("layers=0", "has no setting 'layers'; its settings are .*layer"),
        ("on_error=nan", "has no setting 'on_error'"),
        ("phases=six", "phases=six; pass a whole number"),
        ("pooling=median", "pooling=median; pass one of mean, mean_no_cls, cls, max"),
    ):
        with pytest.raises(InputError, match=message):
            parse_model(f"random:tiny-v2+{name}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reference": "a.parquet"}, "--reference and --queries go together"),
        ({"k": 0}, "--k 0 is too small"),
        ({"temperature": 0.0}, "--temperature 0.0 is too small"),
        ({"lengths": (300, 5)}, "--lengths 5 is too small"),
        ({"models": ()}, "nothing to compare"),
        ({"models": ("vsearch+strand=both",)}, "vsearch has no setting 'strand'; it has no settings"),
    ],
)
def test_wrong_flags_are_errors(flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        taxonomy(**flags)


def write(path: Path, texts: list, names: list[str], **columns: list) -> str:
    pq.write_table(pa.table({"dna_sequence": texts, "taxonomy": names, **columns}), path)
    return str(path)


def test_files_are_read_without_rows_that_are_not_dna(tmp_path: Path) -> None:
    lineage = "A;B;C;D;E;{};{}"
    reference = write(
        tmp_path / "reference.parquet",
        ["ACGTACGT", None, "acgtt", "ACGG"],
        [lineage.format(*names) for names in (("Ga", "Ga x"), ("Ga", "Ga z"), ("Gb", "Gb y"), ("Gb", "Gb sp."))],
    )
    asked = ["ACGT"] * 3, [lineage.format("Ga", "Ga x"), lineage.format("Gb", "Gb q"), lineage.format("Gc", "Gc r")]
    queries = write(tmp_path / "queries.parquet", *asked)
    library, found, split, derived = read_labelled(reference, queries, tmp_path)
    assert library.sequences.to_pylist() == ["ACGTACGT", "ACGTT", "ACGG"]
    assert library.taxa[2, 6] == -1
    assert library.taxa[0, 6] == found.taxa[0, 6] != found.taxa[1, 6]
    assert (split.tolist(), derived) == ([0, 1, 2], True)
    queries = write(tmp_path / "split.parquet", *asked, split=["test_seen", "other", "test_unseen_genus"])
    _, _, split, derived = read_labelled(reference, queries, tmp_path)
    assert (split.tolist(), derived) == ([0, -1, 2], False)
    nothing = write(tmp_path / "nothing.parquet", [None, "protein"], asked[1][:2])
    with pytest.raises(InputError, match=r"nothing\.parquet: none of the 2 rows is DNA"):
        read_labelled(reference, nothing, tmp_path)
    pq.write_table(pa.table({"dna_sequence": ["ACGT"]}), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match=r"bare\.parquet: no labels"):
        read_labelled(reference, str(tmp_path / "bare.parquet"), tmp_path)


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsearch, "installed", lambda: False)
    monkeypatch.setattr("benchmarks.identifying._SIMULATED_SPECIES", 40)
    monkeypatch.setattr("benchmarks.identifying._SIMULATED_ROWS", 4)
    tiny = "random:tiny-v2+layer=0+phases=6"
    wanted = {"models": ("6mer", tiny, "vsearch"), "k": 3, "among": 10, "lengths": (150,), "resamples": 50}
    found = taxonomy(**wanted)
    assert (found["references"], found["rows"], found["test_seen_rows"]) == (96, 64, 32)
    assert found["test_unseen_species_rows"] + found["test_unseen_genus_rows"] == 32
    assert "not installed" in found["vsearch"]
    whole = found["unseen_species_genus_1nn"]
    assert set(whole) == {"6mer", tiny}
    assert whole["6mer"]["micro"] > 0.95
    assert whole["6mer"]["low"] <= whole["6mer"]["micro"] <= whole["6mer"]["high"]
    assert found["unseen_species_genus_among_10"][tiny]["micro"] >= whole[tiny]["micro"]
    assert found["seen_species_probe"]["6mer"]["micro"] > 0.95
    assert found["novelty_auroc"]["6mer"]["area"] > 0.9
    assert found["clustering_species_ami"]["6mer"] > 0.8
    assert found["seen_species_1nn_reversed"]["6mer"]["micro"] < 0.5
    assert found["unseen_species_genus_1nn_150bp"][tiny]["micro"] < whole[tiny]["micro"]
    assert found["embed_seconds_per_1000"]["6mer"] > 0
    text = describe(found)
    assert f"{whole['6mer']['micro']:.3f} ({whole['6mer']['low']:.3f}-" in text
    assert text.count(tiny) == 1
    write_json(found, str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    write_picture(found, str(tmp_path / "found.png"), "title")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_both_strands_of_6mers_make_the_reversed_query_the_same() -> None:
    both = module.make_embed("6mer+strand=both")
    texts = dna("ACGTTGCAACCGGTTAGGC", "TTGACACCA")
    np.testing.assert_array_equal(both(texts), both(reverse_complement(texts)))


def test_the_command_takes_a_list_of_models() -> None:
    done = call("benchmark", "taxonomy", "--models", "6mer+layer=0,random:tiny-v2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "6mer has no setting 'layer'" in done.stderr


@pytest.mark.vsearch
def test_alignment_names_simulated_barcodes() -> None:
    found = taxonomy(models=("vsearch",), lengths=(), cluster=0, resamples=20)
    for name in ("seen_species_1nn", "unseen_species_genus_1nn", "unseen_species_genus_1nn_reversed"):
        assert found[name]["vsearch"]["micro"] > 0.9
