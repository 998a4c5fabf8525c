import base64
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.browser import browsing
from support.places import SCRIPTS
from support.tables import make_table

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError
from bioscan_jax.reports import charts
from bioscan_jax.reports.contents import Taxa, read_contents
from bioscan_jax.reports.identifications import (
    auroc,
    confidence_bins,
    rank_metrics,
    read_identifications,
    read_truth,
)
from bioscan_jax.reports.projection import project
from bioscan_jax.reports.queries import fitting_cigars, read_queries
from bioscan_jax.reports.run import report

SCRIPT = SCRIPTS / "report.py"
EVIL = '</script><img src=x onerror="window.hacked=1">\'&\u2028<!--'


def sequences(rows: int = 120, *, hidden: int = 8, seed: int = 0) -> pa.Table:
    """Three clusters that are three genera, with places, depths, and every fifth species unknown."""
    rng = np.random.default_rng(seed)
    group = np.arange(rows) % 3
    vectors = np.eye(hidden)[group] * 3 + rng.normal(size=(rows, hidden)) * 0.3
    names = {rank: [f"{rank[0].upper()}{g % (1 if k < 2 else 3)}" for g in group] for k, rank in enumerate(RANKS)}
    names["species"] = [None if i % 5 == 0 else f"Genus{g} {('alba', 'nigra')[i % 2]}" for i, g in enumerate(group)]
    columns = {
        "sequence_id": [f"id{i}" for i in range(rows)],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), hidden),
        **names,
        "marker_gene": ["COI" if i % 2 else "18S" for i in range(rows)],
        "depth": [None if i % 7 == 0 else float(i) for i in range(rows)],
        "latitude": [float(i % 10) for i in range(rows)],
        "longitude": [None if i % 4 == 0 else float(i % 10) - 100 for i in range(rows)],
    }
    return pa.table(columns)


def write(directory: Path, table: pa.Table, name: str = "sequences", **facts: str) -> str:
    metadata = {"model": "org/weights", "license": "cc-by-nc-sa-4.0", "plan_facts": '{"data": {"rows": [1]}}'} | facts
    lance.write_dataset(table.replace_schema_metadata(metadata), str(directory / f"{name}.lance"))
    return str(directory)


def changed(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


def answers(table: pa.Table, **columns: object) -> pa.Table:
    """Results as identify writes them: all right and confident, except for the columns given."""
    rows = len(table)
    made = {"sequence_id": table["sequence_id"], **{rank: table[rank] for rank in RANKS}}
    made |= {f"{rank}_confidence": pa.array([0.95] * rows, pa.float64()) for rank in RANKS}
    made |= {"nearest_id": table["sequence_id"], "similarity": pa.array([0.9] * rows, pa.float32())}
    made |= {"identity": pa.array([0.9] * rows, pa.float32()), "novelty": pa.array([0.1] * rows, pa.float64())}
    made |= {"novel": pa.array([False] * rows), "abstained_at": pa.array([None] * rows, pa.string())}
    return pa.table(made | {name: pa.array(values) for name, values in columns.items()})


class Parsed(HTMLParser):
    """Texts of the scripts and styles, all tags, and the policy of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in self.inside:
            self.inside[self.tags[-1]][-1] += data
        self.text += data


def payload(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def decoded(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


# Projection


def test_pacmap_keeps_clusters_together_is_reproducible_and_silent(caplog, capfd):
    rng = np.random.default_rng(0)
    label = np.arange(180) % 3
    vectors = (np.eye(16)[label] * 4 + rng.normal(size=(180, 16)) * 0.2).astype(np.float32)
    vectors[90:93] = vectors[:3] * 7.5
    made = project(vectors, "pacmap", 3)
    np.testing.assert_array_equal(made.points, project(vectors, "pacmap", 3).points)
    assert not np.array_equal(made.points, project(vectors, "pacmap", 4).points)
    assert np.linalg.norm(made.points[90:93] - made.points[:3], axis=1).max() < 0.05 * np.ptp(made.points)
    apart = np.linalg.norm(made.points[:, None] - made.points[None], axis=-1) + np.eye(180) * 1e9
    assert (label[apart.argmin(axis=1)] == label).mean() > 0.97
    assert made.method.startswith("PaCMAP of 16 principal components")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(None, "–"), (0.0, "0.0 %"), (4e-4, "< 0.1 %"), (0.5, "50.0 %"), (0.9998, "> 99.9 %"), (1.0, "100.0 %")],
)
def test_percent_keeps_small_and_large_fractions_apart_from_0_and_1(fraction, text):
    assert charts.percent(fraction) == text


def test_identical_vectors_are_one_point():
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    doubled = project(np.concatenate([vectors, vectors, vectors]), "pacmap", 0).points
    np.testing.assert_array_equal(doubled[:60], doubled[120:])
    np.testing.assert_array_equal(doubled[:60], project(vectors, "pacmap", 0).points)


@pytest.mark.parametrize("rows", [1, 2, 3, 49])
@pytest.mark.parametrize("hidden", [1, 2, 8])
def test_few_vectors_are_projected_by_principal_components(rows, hidden):
    vectors = np.random.default_rng(0).normal(size=(rows, hidden)).astype(np.float32)
    made = project(vectors, "pacmap", 0)
    assert made.points.shape == (rows, 2)
    assert np.isfinite(made.points).all()
    assert "principal components" in made.method
    assert "too few distinct vectors" in made.method


def test_zero_vectors_have_a_point():
    made = project(np.zeros((70, 4), np.float32), "pacmap", 0)
    np.testing.assert_array_equal(made.points, 0)


# Metrics


def test_intervals_are_wilsons_intervals():
    for right, ends in ((5, (0.2366, 0.7634)), (0, (0.0, 0.2775)), (10, (0.7225, 1.0))):
        [only] = confidence_bins(np.full(10, 0.5), np.arange(10) < right)
        assert (only.low, only.high) == pytest.approx(ends, abs=1e-4)


@given(
    st.integers(0, 60).flatmap(
        lambda n: st.tuples(npst.arrays(float, n, elements=st.floats(0, 1)), npst.arrays(bool, n))
    )
)
@settings(deadline=None, max_examples=50)
def test_bins_hold_every_answer_once(drawn):
    confidence, right = drawn
    bins = confidence_bins(confidence, right)
    assert sum(b.count for b in bins) == len(confidence)
    assert sum(b.count * b.correct for b in bins) == pytest.approx(right.sum())
    assert sum(b.count * b.confidence for b in bins) == pytest.approx(confidence.sum())
    assert all(b.low <= b.correct + 1e-9 and b.correct <= b.high + 1e-9 for b in bins)
    assert all(a.confidence <= b.confidence for a, b in itertools.pairwise(bins))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
@settings(deadline=None, max_examples=100)
def test_auroc_is_the_fraction_of_pairs_in_order(drawn):
    score, positive = np.array([s for s, _ in drawn], float), np.array([p for _, p in drawn], bool)
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[positive], score[~positive])]
    assert auroc(score, positive) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_metrics_of_a_small_case(tmp_path):
    table = sequences(10)
    species = ["A a", "A b", "A c", None, "A e"]
    given_answers = answers(
        table.slice(0, 5),
        species=["A a", "A x", None, "A d", "A e"],
        species_confidence=[0.9, 0.8, None, 0.7, 0.6],
        novelty=[0.1, 0.9, 0.8, 0.5, 0.3],
        novel=[False, True, True, False, False],
        abstained_at=[None, "species", "genus", None, None],
    )
    pq.write_table(given_answers, tmp_path / "a.parquet")
    truth = changed(table.slice(0, 5), "species", species).append_column("other", pa.array(range(5)))
    pq.write_table(truth, tmp_path / "t.parquet")
    identified = read_identifications(str(tmp_path / "a.parquet"))
    true = read_truth(str(tmp_path / "t.parquet"), identified.ids)
    uri = write(tmp_path, changed(table, "species", ["A a", "A e"] * 5))
    found = rank_metrics(identified, true, read_contents(uri, "sequences", 100, 0).taxa)[-1]
    assert (found.rank, found.labelled, found.named, found.answered) == ("species", 4, 0.8, 0.6)
    assert found.accuracy == 0.5
    assert found.precision == 1.0
    assert found.in_table == 0.5
    assert [(b.count, b.correct) for b in found.bins] == [(1, 1.0), (1, 0.0), (1, 1.0)]
    assert found.error == pytest.approx((0.1 + 0.8 + 0.4) / 3)
    assert found.separation == 1.0
    without = rank_metrics(identified, true, None)[-1]
    assert (without.accuracy, without.in_table, without.separation) == (0.5, None, None)
    unlabelled = rank_metrics(identified, None, None)[-1]
    assert (unlabelled.labelled, unlabelled.accuracy, unlabelled.bins, unlabelled.error) == (0, None, (), None)


def test_without_a_calibration_nothing_counts_as_answered(tmp_path):
    pq.write_table(answers(sequences(4), novel=pa.nulls(4, pa.bool_())), tmp_path / "a.parquet")
    identified = read_identifications(str(tmp_path / "a.parquet"))
    assert not identified.calibrated
    assert not identified.answered.any()
    assert rank_metrics(identified, None, None)[0].answered is None


# Contents of the table


def test_counts_are_of_all_rows_and_the_sample_is_seeded(tmp_path):
    table = sequences(300)
    uri = write(tmp_path, table)
    some, same, other = (read_contents(uri, "sequences", 50, seed) for seed in (1, 1, 2))
    assert some.total == 300
    assert len(some.rows) == 50
    assert some.rows.ids == same.rows.ids != other.rows.ids
    place = {key: i for i, key in enumerate(table["sequence_id"].to_pylist())}
    for row, key in enumerate(some.rows.ids):
        shown = [None if n < 0 else some.taxa[r].names[n] for r, n in enumerate(some.rows.names[row])]
        assert shown == [table[rank][place[key]].as_py() for rank in RANKS]
        np.testing.assert_array_equal(some.rows.vectors[row], table["vector"][place[key]].as_py())
    genus = some.taxa[RANKS.index("genus")]
    assert genus.counts == (100, 100, 100)
    assert some.taxa[-1].known == 240
    assert some.taxa[-1].counts == tuple(sorted(some.taxa[-1].counts, reverse=True))
    assert not [part for part in some.notes if part != "run"]


def test_coordinates_off_the_globe_are_unknown(tmp_path):
    table = sequences(6)
    table = changed(table, "latitude", [1.0, 91.0, float("nan"), float("inf"), -90.0, 5.0])
    table = changed(table, "longitude", [180.0, 0.0, 0.0, 0.0, -180.0, 181.0])
    rows = read_contents(write(tmp_path, table), "sequences", 10, 0).rows
    np.testing.assert_array_equal(np.isfinite(rows.latitude), [True, False, False, False, True, False])
    np.testing.assert_array_equal(np.isfinite(rows.latitude), np.isfinite(rows.longitude))


def test_coordinates_in_one_column_are_on_the_map(tmp_path):
    table = sequences(3).drop_columns(["latitude", "longitude"])
    table = table.append_column("coord", pa.array(["[54.5, 10]", "lost", None]))
    rows = read_contents(write(tmp_path, table), "sequences", 10, 0).rows
    np.testing.assert_array_equal(rows.latitude, [54.5, np.nan, np.nan])
    np.testing.assert_array_equal(rows.longitude, [10.0, np.nan, np.nan])


def test_missing_parts_are_left_out_with_a_reason(tmp_path):
    make_table(tmp_path, 120)
    summary = report(str(tmp_path), str(tmp_path / "r.html"), projection="pca")
    page = (tmp_path / "r.html").read_text()
    bare = write(tmp_path, sequences(5).drop_columns(list(RANKS)), "bare")
    assert read_contents(bare, "bare", 10, 0).notes["taxa"] == (
        "the table has neither a column taxonomy nor one of genus or species"
    )
    assert "Left out: the table has no column latitude" in page
    assert "Left out: no identifications were given" in page
    assert "is not recorded" not in page
    assert "the table has no column latitude" in str(summary)
    assert read_contents(str(tmp_path), "sequences", 10, 0).rejects == 17
    table = sequences(5)
    uri = write(tmp_path, changed(changed(table, "latitude", ["a"] * 5), "depth", ["b"] * 5), "texts")
    assert set(read_contents(uri, "texts", 10, 0).notes) == {"places", "depth", "run"}
    uri = write(tmp_path, changed(table, "latitude", pa.nulls(5, pa.float64())), "nowhere")
    assert read_contents(uri, "nowhere", 10, 0).notes["places"] == "no row has both a latitude and a longitude"


def test_a_damaged_run_record_is_a_note(tmp_path):
    uri = write(tmp_path, sequences(5))
    (tmp_path / "sequences.run.json").write_text('{"rows": ')
    assert "is no JSON object" in read_contents(uri, "sequences", 10, 0).notes["run"]
    (tmp_path / "sequences.run.json").write_text('{"rows": 5}')
    assert read_contents(uri, "sequences", 10, 0).run == {"rows": 5}


# The page


def test_texts_of_the_data_are_escaped(tmp_path):
    table = sequences(60)
    table = changed(table, "sequence_id", [f"{EVIL}{i}" for i in range(60)])
    table = changed(table, "genus", [EVIL] * 60)
    table = changed(table, "marker_gene", [EVIL] * 60)
    uri = write(tmp_path, table, license=EVIL, model=EVIL, plan_facts=json.dumps({EVIL: EVIL}))
    (tmp_path / "sequences.run.json").write_text(json.dumps({EVIL: {EVIL: [EVIL]}, "rows": EVIL}))
    pq.write_table(answers(table, species=[EVIL] * 60), tmp_path / "a.parquet")
    report(uri, str(tmp_path / "r.html"), identified=str(tmp_path / "a.parquet"), projection="pca")
    page = (tmp_path / "r.html").read_text()
    parsed = Parsed(page)
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    assert "onerror" not in dict(parsed.attributes)
    assert EVIL not in page
    assert payload(page)["ids"] == table["sequence_id"].to_pylist()
    assert payload(page)["names"][RANKS.index("genus")] == [" ".join(EVIL.split())]


def test_the_policy_allows_only_the_pages_own_script_and_style(tmp_path):
    report(write(tmp_path, sequences()), str(tmp_path / "r.html"), projection="pca")
    page = (tmp_path / "r.html").read_text()
    parsed = Parsed(page)
    policy = re.search(r'Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    for kind, text in (("script", parsed.inside["script"][-1]), ("style", parsed.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not {"src", "style", "onclick", "onload"} & set(dict(parsed.attributes))
    assert "://" not in page
    assert "cc-by-nc-sa-4.0" in parsed.text


def test_the_page_holds_what_the_table_holds(tmp_path):
    table = sequences(80)
    pq.write_table(answers(table.slice(3, 4), abstained_at=["genus"] * 4), tmp_path / "a.parquet")
    uri = write(tmp_path, table)
    report(uri, str(tmp_path / "r.html"), identified=str(tmp_path / "a.parquet"), projection="pca")
    data = payload((tmp_path / "r.html").read_text())
    lineages, lineage = decoded(data["lineages"], "<i4").reshape(-1, 7), decoded(data["lineage"], "<u4")
    for rank in range(7):
        codes = lineages[lineage, rank]
        assert [None if c < 0 else data["names"][rank][c] for c in codes] == table[RANKS[rank]].to_pylist()
    np.testing.assert_array_equal(decoded(data["numbers"]["depth"], "<f4"), table["depth"].to_numpy())
    assert [data["markers"][m] for m in decoded(data["marker"], "<i4")] == table["marker_gene"].to_pylist()
    points = decoded(data["xy"], "<u2").reshape(-1, 2).astype(float)
    wanted = project(read_contents(uri, "sequences", 99, 0).rows.vectors, "pca", 0).points
    wanted = wanted - wanted.min(axis=0)
    np.testing.assert_allclose(points, wanted / wanted.max() * 65535, atol=0.6)
    assert [i for i, text in enumerate(data["found"]) if text] == [3, 4, 5, 6]
    assert data["found"][3] == "F0 (family, confidence 0.950)"


def details(table: pa.Table, hidden: int = 8) -> pa.Table:
    """Answers with the columns that identify adds for the page; the last query was rejected."""
    rows, dna = len(table), ["ACGTACGT"] * (len(table) - 1) + [None]
    vectors = pa.array([[float(i)] + [1.0] * (hidden - 1) for i in range(rows)], pa.list_(pa.float32(), hidden))
    more = {"sequence": dna, "alignment_start": pa.array([2] * rows, pa.int32()), "alignment": ["1S7="] * rows}
    return answers(table, **more, vector=vectors, nearest_id=["id9"] * rows)


def test_queries_of_their_own_vectors_are_on_the_map(tmp_path):
    table = sequences(40).append_column("dna_sequence", pa.array(["GGCGTACGTT"] * 20 + ["TTTTT"] * 20))
    uri, path = write(tmp_path, table), str(tmp_path / "a.parquet")
    asked = changed(table.slice(0, 6), "sequence_id", [f"q{i}" for i in range(6)])
    pq.write_table(details(asked), path)
    found = read_queries(path, 3, 0)
    assert (len(found), found.total) == (3, 5)
    np.testing.assert_array_equal(found.vectors[:, 0], found.index)
    # Of the sample of 5 rows the nearest reference is no part
    report(uri, str(tmp_path / "r.html"), identified=path, projection="pca", rows=5)
    page = (tmp_path / "r.html").read_text()
    data = payload(page)
    assert "a random sample of 5 and 1 nearest reference of the queries on the map" in page
    assert (data["rows"], data["ids"][5:]) == (6, ["id9", "q0", "q1", "q2", "q3", "q4"])
    assert len(decoded(data["xy"], "<u2")) == 2 * 11
    assert decoded(data["queries"]["nearest"], "<i4").tolist() == [5] * 5
    assert data["queries"]["cigar"] == ["1S7="] * 5
    lines = gzip.decompress(base64.b64decode(data["dna"])).decode().split("\n")
    texts = dict(zip(decoded(data["dna_of"], "<i4").tolist(), lines, strict=True))
    assert (texts[5], texts[6], len(texts)) == ("GGCGTACGTT", "ACGTACGT", 11)
    pq.write_table(details(asked, hidden=4), path)
    with pytest.raises(InputError, match="vectors of 4 numbers, those of .* have 8"):
        report(uri, str(tmp_path / "r.html"), identified=path, projection="pca")


def test_an_alignment_that_fits_no_longer_is_left_out(tmp_path):
    pq.write_table(details(sequences(5)), tmp_path / "a.parquet")
    found = read_queries(str(tmp_path / "a.parquet"), 9, 0)
    assert fitting_cigars(found, {"id9": "ACGTACGTA"}) == ["1S7="] * 4
    assert fitting_cigars(found, {"id9": "ACGTACGT"}) == fitting_cigars(found, {}) == [""] * 4


def test_pictures_are_drawn_where_there_is_data(tmp_path):
    table = sequences(60)
    pq.write_table(answers(table), tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "t.parquet")
    uri = write(tmp_path, changed(table, "genus", ["$a_{b$"] * 60))
    files = {"identified": str(tmp_path / "a.parquet"), "truth": str(tmp_path / "t.parquet")}
    summary = report(uri, str(tmp_path / "r.html"), **files, pictures=str(tmp_path / "png" / "deep"), projection="pca")
    assert [Path(p).stem for p in summary.pictures] == ["embedding", "places", "taxa", "calibration", "novelty"]
    for path in summary.pictures:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 10_000
    bare = report(write(tmp_path, table.select(["sequence_id", "vector"]), "bare"), str(tmp_path / "b.html"), "bare",
                  pictures=str(tmp_path / "bare"), projection="pca")  # fmt: skip
    assert [Path(p).stem for p in bare.pictures] == ["embedding"]


def test_charts_in_the_page_are_reproducible_themed_and_escaped(tmp_path):
    identifications = answers(sequences(50), novelty=np.linspace(-0.2, 1.3, 50), novel=np.arange(50) > 30)
    pq.write_table(identifications, tmp_path / "a.parquet")
    results = read_identifications(str(tmp_path / "a.parquet"))
    taxa = Taxa((EVIL, "$a_{b$", "\x0b" * 60), (7, 5, 1))
    given = [(charts.draw_novelty, results), (charts.draw_taxa, "genus", taxa)]
    first, second = ([charts.as_svg(*g, label=f'"{EVIL}', width=400, height=200) for g in given] for _ in range(2))
    assert first == second
    for svg in first:
        parsed = Parsed(svg)
        attributes = dict(parsed.attributes)
        assert attributes["aria-label"] == f'"{EVIL}'
        assert not {"style", "src", "onerror"} & set(attributes)
        assert "img" not in parsed.tags
        assert "var(--accent)" in svg
        ids = [value for name, value in parsed.attributes if name == "id"]
        assert len(ids) == len(set(ids))
    assert "<title>1.26 to 1.3: 2 flagged as novel</title>" in first[0]
    assert "$a_{b$" in first[1]


def test_the_coastline_is_small_and_stays_on_the_map():
    rings = charts.coastline()
    assert len(json.dumps(rings)) < 100_000
    for ring in rings:
        xy = np.array(ring).reshape(-1, 2)
        assert (np.abs(xy) <= [1800, 900]).all()
        jumps = np.abs(np.diff(xy, axis=0))[:, 0] > 600
        assert (xy[1:][jumps, 1] == -900).all()


MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color: str) -> np.ndarray:
    c = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", MACHADO)
@pytest.mark.parametrize(
    ("taxa", "rest", "least"),
    [
        (charts.LIGHT, (charts.LIGHT_OTHER, charts.LIGHT_UNKNOWN), 19),
        (charts.DARK, (charts.DARK_OTHER, charts.DARK_UNKNOWN), 24),
    ],
)
def test_colours_differ_with_every_colour_vision(taxa, rest, least, sight):
    seen = [lab(np.array(MACHADO[sight]) @ linear(color)) for color in (*taxa, *rest)]
    assert len(taxa) == charts.TOP
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


# Errors


def test_wrong_settings_and_tables(tmp_path):
    uri = write(tmp_path, sequences(5))
    write(tmp_path, sequences(5).slice(0, 0), "empty")
    write(tmp_path, sequences(5).drop_columns("vector"), "plain")
    broken = sequences(5)
    values = np.full(40, np.nan, np.float32)
    broken = broken.set_column(1, "vector", pa.FixedSizeListArray.from_arrays(pa.array(values), 8))
    write(tmp_path, broken, "broken")
    html = str(tmp_path / "r.html")
    cases: list[tuple[dict, str]] = [
        ({"table": "none"}, "has no table 'none' (there are: broken, empty, plain, sequences)"),
        ({"table": "../x"}, "must be letters"),
        ({"table": "empty"}, "has no rows, so there is nothing to report"),
        ({"table": "plain"}, "is no vector table"),
        ({"table": "broken"}, "the vector of 'id0' is not finite"),
        ({"output": str(tmp_path / "no" / "r.html")}, "there is no directory"),
        ({"output": str(tmp_path / "r.txt")}, "pass FILE.html"),
        ({"rows": 0}, "--rows 0"),
        ({"seed": -1}, "--seed -1"),
        ({"truth": "x.parquet"}, "--truth without --identified"),
        ({"identified": str(tmp_path / "x.parquet")}, "there is no such file"),
        ({"pictures": str(SCRIPT / "x")}, "--pictures"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError) as caught:
            report(**({"uri": uri, "output": html, "projection": "pca"} | changes))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wrong_files_of_identifications_and_truth(tmp_path):
    table = sequences(4)
    good = answers(table)
    path = str(tmp_path / "a.parquet")
    cases = [
        (good.drop_columns("novelty"), "has no column 'novelty'"),
        (good.slice(0, 0), "has no rows"),
        (changed(good, "abstained_at", ["tribe"] * 4), "abstained_at 'tribe'"),
        (changed(good, "novelty", ["high"] * 4), "column 'novelty' has the type string"),
    ]
    for wrong, message in cases:
        pq.write_table(wrong, path)
        with pytest.raises(InputError, match=re.escape(message)):
            read_identifications(path)
    Path(path).write_bytes(b"sequence_id,species\n")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_identifications(path)
    twice = pa.concat_tables([table, changed(table, "genus", ["X"] * 4)])
    cases = [
        (table.drop_columns("sequence_id"), "has no column 'sequence_id'"),
        (table.drop_columns(["genus", "species"]), "neither a column 'taxonomy' nor one of genus or species"),
        (twice, "has 'id0' twice"),
        (changed(table, "sequence_id", list("wxyz")), "none of the sequence_ids"),
    ]
    for wrong, message in cases:
        pq.write_table(wrong, path)
        with pytest.raises(InputError, match=re.escape(message)):
            read_truth(path, ("id0", "id1"))


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", "\t"), ("t.csv", ";"), ("t.txt", ",")])
def test_truth_is_read_from_text_as_from_parquet(tmp_path, name, delimiter):
    table = sequences(4).select(["sequence_id", *RANKS])
    path = tmp_path / name
    pq.write_table(table, tmp_path / "t.parquet")
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    lines = [delimiter.join(cell or "" for cell in row) for row in [table.column_names, *rows]]
    path.write_text("\n".join(lines) + "\n")
    wanted = ("id0", "id3", "nobody")
    assert read_truth(str(path), wanted) == read_truth(str(tmp_path / "t.parquet"), wanted)
    first = lines[1].split(delimiter)
    path.write_text("\n".join([*lines, delimiter.join([*first[:-1], "Another name"])]))
    with pytest.raises(InputError, match=rf"has 'id0' twice with different names, again in .*{name} line 6; keep one"):
        read_truth(str(path), wanted)
    path.write_text("\n".join([*lines[:2], first[0]]))
    with pytest.raises(InputError, match=rf"--truth .*{name} line 3: 1 cells, but the header has 8"):
        read_truth(SideTableConfig(path=str(path), delimiter=delimiter), wanted)


def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path):
    uri = write(tmp_path, sequences(5))
    html = tmp_path / "r.html"
    html.mkdir()
    with pytest.raises(InputError, match="that is a directory"):
        report(uri, str(html), projection="pca")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".r.html")]


def test_the_script_reports_and_prints_errors_in_one_line(tmp_path):
    uri = write(tmp_path, sequences(30))
    run = [sys.executable, str(SCRIPT), "--uri", uri, "--projection", "pca", "--output"]
    done = subprocess.run([*run, str(tmp_path / "r.html")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/r.html: 30 of 30 rows, ")
    wrong = subprocess.run([*run, "r.html", "--table", "none"], capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


# In a browser

TIP = "document.querySelector('#{} .tip').innerText"
AT = """(() => {{
  const front = document.querySelector('#{0} .front');
  front.scrollIntoView({{ block: 'center' }});
  const box = front.getBoundingClientRect(), [x, y] = reportMaps.{0}.toScreen({1});
  return [box.left + x, box.top + y];
}})()"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A page with every part, and hostile names in it."""
    directory = tmp_path_factory.mktemp("shown")
    table = sequences(200)
    table = changed(table, "sequence_id", [f"id{i}{EVIL if i % 2 else ''}" for i in range(200)])
    pq.write_table(answers(table, novelty=np.linspace(0, 1, 200)), directory / "a.parquet")
    pq.write_table(table, directory / "t.parquet")
    files = {"identified": str(directory / "a.parquet"), "truth": str(directory / "t.parquet")}
    report(write(directory, table), str(directory / "r.html"), **files, projection="pca")
    return directory / "r.html"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_console_messages_and_fits(shown, tmp_path, width):
    with browsing(tmp_path) as page:
        inks = set()
        for dark in (False, True):
            page.open(shown, width, 900, dark=dark, touch=width < 600)
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("window.hacked") is None
            inks.add(page.run("getComputedStyle(document.body).backgroundColor"))
            drawn = """document.querySelector('#{} .front').getContext('2d')
                .getImageData(0, 0, 5000, 3000).data.some(v => v)"""
            assert page.run(drawn.format("embedding"))
            assert page.run(drawn.format("places"))
        assert len(inks) == 2
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} == {"file"}


@pytest.mark.browser
def test_hover_keys_and_controls_work(shown, tmp_path):
    with browsing(tmp_path) as page:
        page.open(shown, 1280, 900)
        data = payload(shown.read_text())
        for row in (0, 1, 57):
            page.move(*page.run(AT.format("embedding", row)))
            lines = page.run(TIP.format("embedding")).split("\n")
            at = page.run(f"reportMaps.embedding.nearest(...reportMaps.embedding.toScreen({row}))")
            assert at == row
            assert lines[0].split() == data["ids"][row].split()
            assert lines[1].startswith(f"K0 › P0 › C{row % 3} › O{row % 3}")
            assert lines[2] == ("depth unknown" if row % 7 == 0 else f"depth {row} m")
            assert any(line.startswith("identified as ") for line in lines)
        page.move(*page.run(AT.format("places", 0)))
        assert re.search(r"^1\.000, -99\.000\n20 rows\ndepth 1 to 191 m\nmost often K0", page.run(TIP.format("places")))
        before = page.run("reportMaps.embedding.toScreen(5)")
        page.run("document.querySelector('#embedding .front').focus()")
        page.press("+")
        page.press("ArrowLeft")
        assert page.run("reportMaps.embedding.toScreen(5)") != before
        page.press("0")
        np.testing.assert_allclose(page.run("reportMaps.embedding.toScreen(5)"), before)
        legend = "[...document.querySelectorAll('#embedding .legend button')].map(b => b.innerText)"
        change = "(s => { s.value = %r; s.dispatchEvent(new Event('change')); })"
        change += "(document.querySelector('#embedding select'))"
        page.run(change % "genus")
        assert page.run(legend) == ["G0 (67)", "G1 (67)", "G2 (66)"]
        page.run(change % "species")
        assert page.run(legend)[-1] == "unknown (40)"
        page.run(change % "novelty")
        assert len(page.run(legend)) == 8
        page.run(change % "depth")
        assert page.run(legend)[0].startswith("1 to below 25 m (")
        assert page.run(legend)[7].startswith("174 to 199 m (")
        find = "(f => { f.value = 'g1'; f.dispatchEvent(new Event('input')); })"
        page.run(f"{find}(document.querySelector('#embedding input'))")
        assert page.run("document.querySelector('#embedding .found').innerText") == "67 found"
        assert page.problems == []


@pytest.mark.browser
def test_tooltips_stay_inside_the_map_on_a_phone(shown, tmp_path):
    with browsing(tmp_path) as page:
        page.open(shown, 390, 844, touch=True)
        for name, row in [("embedding", row) for row in range(0, 200, 9)] + [("places", row) for row in range(10)]:
            room = page.run(f"""(() => {{
              reportMaps.{name}.hover(...reportMaps.{name}.toScreen({row}));
              const tip = document.querySelector('#{name} .tip'), box = tip.getBoundingClientRect();
              const stage = tip.parentElement.getBoundingClientRect();
              return [box.left - stage.left, stage.right - box.right, box.top - stage.top, box.height];
            }})()""")
            assert min(room) > 0


@pytest.mark.browser
def test_a_class_shown_alone_is_visible_at_each_of_its_places(shown, tmp_path):
    with browsing(tmp_path) as page:
        page.open(shown, 1280, 900)
        page.run("(s => { s.value = 'class'; s.dispatchEvent(new Event('change')); })"
                 "(document.querySelector('#places select'))")  # fmt: skip
        for k in range(3):  # each place has rows of all three
            page.run(f"document.querySelectorAll('#places .legend button')[{k}].click()")
            inks = page.run(f"""(() => {{
              const map = reportMaps.places, front = document.querySelector('#places .front');
              map.draw();
              const [x, y] = map.toScreen(4).map(Math.round);
              const pixel = front.getContext('2d').getImageData(x, y, 1, 1).data;
              const dot = document.querySelectorAll('#places .legend .dot')[{k}];
              return [`rgb(${{pixel[0]}}, ${{pixel[1]}}, ${{pixel[2]}})`, getComputedStyle(dot).backgroundColor];
            }})()""")
            assert inks[0] == inks[1]


@pytest.mark.browser
def test_fifty_thousand_points_stay_smooth(tmp_path):
    table = sequences(50_000, hidden=4)
    uri = write(tmp_path, changed(table, "sequence_id", [f"specimen-{i:08d}" for i in range(50_000)]))
    summary = report(uri, str(tmp_path / "r.html"), projection="pca")
    assert summary.size < 8e6
    with browsing(tmp_path) as page:
        page.open(tmp_path / "r.html", 1280, 900)
        spent = page.run("""(async () => {
          const map = reportMaps.embedding, draws = [], looks = [];
          for (let k = 0; k < 21; k++) {
            map.pan(3, 1);
            let start = performance.now(); map.draw(); draws.push(performance.now() - start);
            start = performance.now(); map.nearest(300 + 20 * k, 300); looks.push(performance.now() - start);
            await new Promise(requestAnimationFrame);
          }
          return [draws, looks].map((times) => times.sort((a, b) => a - b)[10]);
        })()""")
    draw, look = spent
    assert draw < 50, "milliseconds for a frame"
    assert look < 10, "milliseconds to find the point under the mouse"
