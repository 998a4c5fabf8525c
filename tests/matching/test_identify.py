"""identify, calibrate and search, from files to files."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.places import ROOT, SCRIPTS
from support.reference_table import World, embed_reference, make_world

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching import calibration, candidates
from bioscan_jax.matching.answers import ANSWERS
from bioscan_jax.matching.calibration import CalibrationSummary, calibrate
from bioscan_jax.matching.candidates import Candidates, Matcher
from bioscan_jax.matching.identify import IdentifySummary, identify
from bioscan_jax.matching.search import open_table
from bioscan_jax.matching.vote import Voting


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def ask(world: World, path: str, output: Path | str, **more) -> IdentifySummary:
    chosen = {"k": 10, "rerank": "alignment", "processes": 1}
    chosen |= {name: more.pop(name) for name in ("k", "filter", "rerank", "strand") if name in more}
    settings = config.IdentifyConfig(**chosen)
    reference = config.ReferenceConfig(uri=more.pop("uri", world.uri))
    return identify(reference, config.QueryConfig(path=path), str(output), settings, progress=False, **more)


def test_names_known_species_and_keeps_the_published_columns(world: World, tmp_path: Path):
    summary = ask(world, world.queries, tmp_path / "a.parquet")
    found, given = pq.read_table(tmp_path / "a.parquet"), pq.read_table(world.queries)
    assert summary.distant == sum(row["species"] is not None and row["identity"] < 0.9 for row in found.to_pylist())
    assert ("distant  " in str(summary)) == (summary.distant > 0)
    assert found.schema.names == ANSWERS.names
    assert found["sequence_id"].to_pylist() == given["sequence_id"].to_pylist()
    pairs = list(zip(found["species"].to_pylist(), given["species"].to_pylist(), strict=True))
    known = [answer == truth for answer, truth in pairs if truth not in world.unseen]
    assert sum(known) / len(known) > 0.9
    for row in found.to_pylist():
        shares = [row[f"{rank}_confidence"] for rank in RANKS]
        assert shares == sorted(shares, reverse=True)
        assert row["novel"] is None
        assert row["abstained_at"] is None


def test_fasta_is_answered_as_parquet(world: World, tmp_path: Path):
    ask(world, world.queries, tmp_path / "a.parquet")
    ask(world, world.fasta, tmp_path / "b.parquet", details=True)
    whole, some = pq.read_table(tmp_path / "a.parquet"), pq.read_table(tmp_path / "b.parquet")
    assert some.select(["sequence_id", *RANKS]).equals(whole.slice(0, 20).select(["sequence_id", *RANKS]))
    for row in some.to_pylist():  # the details agree with the evidence
        steps = re.findall(r"(\d+)([=XIDS])", row["alignment"])
        compared = sum(int(length) for length, kind in steps if kind != "S")
        assert compared == row["overlap"]
        assert sum(int(length) for length, kind in steps if kind == "=") / compared == pytest.approx(row["identity"])
        assert len(row["sequence"]) == sum(int(length) for length, kind in steps if kind != "D")
        assert len(row["vector"]) == len(some["vector"][0])
    with pytest.raises(InputError, match="only Parquet holds vectors"):
        ask(world, world.fasta, tmp_path / "c.tsv", details=True)


def half_reversed(world: World, directory: Path) -> tuple[str, list[str]]:
    """Queries of which every second one is reverse complemented and has an abundance, and their strands."""
    rows = pq.read_table(world.queries).slice(0, 40).to_pylist()
    for row in rows[::2]:
        row["dna_sequence"] = row["dna_sequence"][::-1].translate(str.maketrans("ACGT", "TGCA"))
    lines = [f">{row['sequence_id']};size={place};\n{row['dna_sequence']}\n" for place, row in enumerate(rows)]
    (directory / "mixed.fasta").write_text("".join(lines))
    return str(directory / "mixed.fasta"), ["-", "+"] * 20


@pytest.mark.parametrize("table", ["as written", pytest.param("both strands", marks=pytest.mark.slow), "no DNA"])
def test_queries_of_either_strand_get_the_same_names(world: World, tmp_path: Path, table: str):
    uri, rerank = world.uri, "alignment"
    if table == "both strands":
        uri = str(tmp_path / "db")
        embed_reference(Path(world.queries).with_name("reference.parquet"), uri, strand="both")
    elif table == "no DNA":
        uri, rerank = str(tmp_path / "db"), "none"
        shutil.copytree(world.uri, uri)
        lance.dataset(f"{uri}/sequences.lance").drop_columns(["dna_sequence"])
    (tmp_path / "out").mkdir()
    path, strands = half_reversed(world, tmp_path)
    settings = {"k": 10, "rerank": rerank, "uri": uri}
    ask(world, world.queries, tmp_path / "out/plain.parquet", **settings, strand="plus")
    ask(world, path, tmp_path / "out/mixed.parquet", **settings)
    plain, mixed = (pq.read_table(tmp_path / f"out/{name}.parquet") for name in ("plain", "mixed"))
    columns = [*RANKS, "nearest_id", "strand"]
    wanted = plain.slice(0, 40).drop_columns(["strand"]).append_column("strand", pa.array(strands))
    pairs = zip(mixed.select(columns).to_pylist(), wanted.select(columns).to_pylist(), strict=True)
    different = sum(one != other for one, other in pairs)
    assert different <= (2 if table == "no DNA" else 0)  # cosines of a random model alone may err
    assert set(plain["strand"].to_pylist()) == {"+"}
    assert mixed["size"].to_pylist() == list(range(40))
    ask(world, path, tmp_path / "out/mixed.sintax", **settings)
    fields = [line.split("\t") for line in (tmp_path / "out/mixed.sintax").read_text().splitlines()]
    assert [(one[0], one[2]) for one in fields] == list(
        zip(mixed["sequence_id"].to_pylist(), mixed["strand"].to_pylist(), strict=True)
    )
    ask(world, path, tmp_path / "out/plus.parquet", **settings, strand="plus")
    assert set(pq.read_table(tmp_path / "out/plus.parquet")["strand"].to_pylist()) == {"+"}


@pytest.mark.parametrize("condition", ["depht > 3", "true; DROP TABLE sequences", "species = 'nobody'"])
def test_a_wrong_filter_is_one_line_and_leaves_no_file(world: World, tmp_path: Path, condition: str):
    with pytest.raises(InputError, match="filter") as caught:
        ask(world, world.fasta, tmp_path / "a.parquet", filter=condition)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_table_or_empty_input_is_one_line(world: World, tmp_path: Path):
    (empty := tmp_path / "empty.fasta").write_text("")
    for path, uri in ((str(empty), world.uri), (world.fasta, str(tmp_path / "none"))):
        with pytest.raises(InputError) as caught:
            ask(world, path, tmp_path / "a.parquet", uri=uri)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "a.parquet").exists()


def calibrated(world: World, **more) -> CalibrationSummary:
    settings = config.IdentifyConfig(k=10, rerank="alignment", processes=1)
    wanted = config.CalibrateConfig(precision=0.8, risk=0.2, held_out=0.4, **more)
    return calibrate(
        config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries), settings, wanted, progress=False
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, CalibrationSummary]:
    world = make_world(tmp_path_factory.mktemp("judged"), species=150)
    return world, calibrated(world)


def test_calibrated_answers_stop_where_the_threshold_is_missed(
    judged: tuple[World, CalibrationSummary], tmp_path: Path
):
    world, fitted = judged
    assert f"{world.uri}/sequences.calibration.json" == fitted.path
    summary = ask(world, world.queries, tmp_path / "a.parquet")
    assert "precision 0.8 on" in summary.calibration
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    thresholds = [fit.threshold for fit in fitted.calibration.ranks]
    for row in found:
        missed = [
            rank
            for rank, least in zip(RANKS, thresholds, strict=True)
            if least is None or row[f"{rank}_confidence"] < least
        ]
        assert row["abstained_at"] == (missed[0] if missed else None)
        assert row["novel"] == (row["novelty"] > fitted.calibration.novelty_threshold)
    truth = pq.read_table(world.queries)["species"].to_pylist()
    unseen = [row["novelty"] for row, name in zip(found, truth, strict=True) if name in world.unseen]
    known = [row["novelty"] for row, name in zip(found, truth, strict=True) if name not in world.unseen]
    assert sum(one > other for one in unseen for other in known) / (len(unseen) * len(known)) > 0.9
    assert summary.novel == sum(row["novel"] for row in found)


def test_the_vote_is_fitted_on_the_fitting_part_only(judged: tuple[World, CalibrationSummary], monkeypatch):
    world, fitted = judged
    seen: list[Candidates] = []

    def watched(matcher: Matcher, part: Candidates) -> Voting:
        seen.append(part)
        return best_voting(matcher, part)

    best_voting = calibration._best_voting
    monkeypatch.setattr(calibration, "_best_voting", watched)
    before = Path(fitted.path).read_bytes()
    assert calibrated(world).calibration == fitted.calibration
    assert Path(fitted.path).read_bytes() == before
    known = set(pq.read_table(Path(world.queries).with_name("reference.parquet"))["dna_sequence"].to_pylist())
    texts = [text for text in pq.read_table(world.queries)["dna_sequence"].to_pylist() if text not in known]
    wanted = config.CalibrateConfig(precision=0.8, risk=0.2, held_out=0.4)
    [part] = seen
    assert part.texts == [texts[row] for row in calibration.split_labelled(texts, wanted)[1]]
    voting = fitted.calibration.voting
    assert voting.identity_weight in calibration._IDENTITY_WEIGHTS
    assert voting.saturation in calibration._SATURATIONS
    assert voting.temperature in calibration._TEMPERATURES


def test_a_given_weight_is_kept_by_the_calibration(world: World, tmp_path: Path):
    voting = Voting(identity_weight=3.0, saturation=0.1, temperature=0.07)
    settings = config.IdentifyConfig(
        k=10, rerank="alignment", processes=1, identity_weight=3.0, saturation=0.1, temperature=0.07
    )
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    path = Path(world.uri, "sequences.calibration.json")
    path.write_text("of an earlier version")
    wanted = config.CalibrateConfig(precision=0.8, risk=0.2, held_out=0.4)
    try:
        fitted = calibrate(reference, query, settings, wanted, progress=False)
        assert fitted.calibration.voting == voting
        summary = identify(reference, query, str(tmp_path / "a.tsv"), settings, progress=False)
        text = "cosine + 3 x identity (without transitions beyond 0.1), temperature 0.07, weight of the heads 0"
        assert summary.vote == text
        assert "precision 0.8" in summary.calibration
    finally:
        path.unlink()


def test_a_calibration_is_the_same_again_and_stays_beside_one_for_other_settings(judged, tmp_path: Path):
    world, summary = judged
    before = Path(summary.path).read_bytes()
    again = calibrated(world)
    assert again.calibration == summary.calibration
    assert Path(summary.path).read_bytes() == before
    settings = config.IdentifyConfig(k=5)
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    other = identify(reference, query, str(tmp_path / "a.tsv"), settings, progress=False)
    assert "none for these settings, only for k 10, rerank alignment, aligned 32" in other.calibration
    calibrate(reference, query, settings, config.CalibrateConfig(precision=0.8, risk=0.2), progress=False)
    both = json.loads(Path(summary.path).read_text())["calibrations"]
    assert [entry["settings"]["k"] for entry in both] == [10, 5]
    Path(summary.path).write_bytes(before)


def test_a_calibration_of_another_table_is_refused(judged, world: World, tmp_path: Path):
    _, summary = judged
    with pytest.raises(InputError, match=r"is the calibration of another table \(its plan, rows differ\)"):
        ask(world, world.fasta, tmp_path / "a.parquet", calibration=summary.path)
    with pytest.raises(InputError, match=r"^--calibration .*none.json: there is no such file"):
        ask(world, world.fasta, tmp_path / "a.parquet", calibration=str(tmp_path / "none.json"))
    assert not list(tmp_path.iterdir())


def test_labelled_barcodes_of_the_reference_are_counted_and_left_out(judged, tmp_path: Path):
    """Three have an id of the reference, and two more its sequence under another id, written differently."""
    world, _ = judged
    given, held = pq.read_table(world.queries), pq.read_table(Path(world.queries).with_name("reference.parquet"))
    known = set(held["dna_sequence"].to_pylist())
    rows = [row for row in given.to_pylist() if row["dna_sequence"] not in known]
    for row, known in zip(rows[:3], held.to_pylist(), strict=False):
        row["sequence_id"] = known["sequence_id"]
    for row, known in zip(rows[3:5], held.slice(9).to_pylist(), strict=False):
        row["dna_sequence"] = known["dna_sequence"].lower() + "\n"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labelled.parquet")
    reference, settings = config.ReferenceConfig(uri=world.uri), config.IdentifyConfig(k=5)
    wanted = config.CalibrateConfig(precision=0.8, risk=0.2)
    path = Path(world.uri, "sequences.calibration.json")
    before = path.read_bytes()
    found = {}
    for overlap, words in (("exclude", "left out (--overlap keep uses them)"), ("keep", "used all the same")):
        how = dataclasses.replace(wanted, overlap=overlap)
        query = config.QueryConfig(path=str(tmp_path / "labelled.parquet"))
        summary = calibrate(reference, query, settings, how, progress=False)
        share = (
            f"5 of {len(rows)} labelled barcodes ({5 / len(rows):.1%}) are in the reference, by id or sequence: {words}"
        )
        assert share in str(summary)
        found[overlap] = json.loads(path.read_text())["calibrations"][-1]["fitted_on"]
        assert found[overlap]["in_reference"] == {"rows": 5, "of": len(rows), "used": overlap == "keep"}
    exclude, keep = (found[name]["rows"] + found[name]["held_out"] for name in ("exclude", "keep"))
    assert (exclude, keep) == (len(rows) - 5, len(rows))
    path.write_bytes(before)
    query = config.QueryConfig(path=str(Path(world.queries).with_name("reference.parquet")))
    with pytest.raises(InputError, match=r"too few .*\(100.0%\) are in the reference, by id or sequence: left out"):
        calibrate(reference, query, settings, wanted, progress=False)
    assert path.read_bytes() == before


def test_labels_are_needed_to_calibrate(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="queries.fasta has no labels; pass barcodes with a column of lineages"):
        calibrate(config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.fasta), progress=False)
    some = str(tmp_path / "some.parquet")
    labels = pq.read_table(world.queries)
    pq.write_table(labels.select(["sequence_id", "dna_sequence", "genus", "species"]), some)
    with pytest.raises(
        InputError, match="labels no barcode with a name of kingdom, phylum, class, order, family, which"
    ):
        calibrate(config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=some), progress=False)
    assert not Path(world.uri, "sequences.calibration.json").exists()


def test_novel_barcodes_are_grouped(judged, tmp_path: Path):
    world, _ = judged
    summary = ask(world, world.queries, tmp_path / "a.parquet", groups=str(tmp_path / "groups.tsv"), group_size=4)
    lines = (tmp_path / "groups.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["sequence_id", "group", "size", "representative"]
    assert len(lines) - 1 == summary.novel
    given = pq.read_table(world.queries)
    species = dict(zip(given["sequence_id"].to_pylist(), given["species"].to_pylist(), strict=True))
    rows = [line.split("\t") for line in lines[1:]]
    grouped = [row for row in rows if row[1]]
    assert summary.groups == len({row[1] for row in grouped})
    assert summary.groups > 10
    same = [species[row[0]] == species[row[3]] for row in grouped]
    assert sum(same) / len(same) > 0.9


def test_groups_need_a_calibration(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="--groups needs a calibration .*none for this table"):
        ask(world, world.fasta, tmp_path / "a.parquet", groups=str(tmp_path / "g.tsv"))
    assert not list(tmp_path.iterdir())


def test_recall_is_measured(world: World, tmp_path: Path):
    summary = ask(world, world.queries, tmp_path / "a.parquet", check_recall=30)
    assert summary.recall[0].endswith("among the candidates (k 10, 30 sampled queries)")
    assert 0.5 <= float(summary.recall[0].split()[0]) < 1.0
    summary = ask(world, world.fasta, tmp_path / "a.parquet", check_recall=20, k=1000)
    assert summary.recall[0].startswith("1.0000 ")
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    with pytest.raises(InputError, match="--check_recall has nothing to measure"):
        identify(reference, query, str(tmp_path / "b.tsv"), check_recall=3, progress=False)


def test_the_index_finds_what_an_exact_search_does(tmp_path: Path):
    world = make_world(tmp_path, index="ivf_sq")
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    settings = config.IdentifyConfig(k=10, search="index")
    summary = identify(reference, query, str(tmp_path / "b.tsv"), settings, check_recall=40, progress=False)
    assert summary.search.startswith("index, ")
    [line] = summary.recall
    assert line.endswith("found by the index (k 10, 40 sampled queries)")
    assert float(line.split()[0]) >= 0.95


def test_sintax_and_tsv_hold_the_same_as_parquet(judged, tmp_path: Path):
    world, _ = judged
    for ending in ("parquet", "tsv", "sintax"):
        ask(world, world.fasta, tmp_path / f"a.{ending}")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len({row["abstained_at"] for row in rows}) > 1
    table = [line.split("\t") for line in (tmp_path / "a.tsv").read_text().splitlines()]
    sintax = [line.split("\t") for line in (tmp_path / "a.sintax").read_text().splitlines()]
    assert table[0] == ANSWERS.names
    assert len(table) - 1 == len(sintax) == len(rows)
    for row, cells, fields in zip(rows, table[1:], sintax, strict=True):
        assert cells[:8] == [row["sequence_id"], *(row[rank] for rank in RANKS)]
        assert cells[-1] == (row["abstained_at"] or "")
        assert fields[0] == row["sequence_id"]
        species = row["species"].replace(" ", "_")
        assert fields[1].endswith(f",s:{species}({row['species_confidence']:.4f})")
        answered = fields[3].split(",") if fields[3] else []
        assert len(answered) == (7 if row["abstained_at"] is None else RANKS.index(row["abstained_at"]))


def test_a_darwin_core_archive_holds_the_answers(judged, tmp_path: Path):
    from dwca.read import DwCAReader

    world, _ = judged
    ask(world, world.fasta, tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    names = {row["species"] for row in rows}
    (tmp_path / "ids.tsv").write_text("name\tAphiaID\n" + "".join(f"{name}\t{7}\n" for name in names))
    flags = [f"--reference.uri={world.uri}", f"--query.path={world.fasta}", "--k=10", "--rerank=alignment"]
    flags += [f"--taxon_ids={tmp_path / 'ids.tsv'}", "--title", "Fish", "--processes=1"]
    done = call("identify", *flags, "--output", tmp_path / "names.dwca.zip")
    assert done.returncode == 0, done.stderr
    assert "eml.xml still needs --email" in done.stdout
    with DwCAReader(str(tmp_path / "names.dwca.zip")) as reader:
        found = [{term.rpartition("/")[2]: text for term, text in row.data.items()} for row in reader]
    assert [one["occurrenceID"] for one in found] == [row["sequence_id"] for row in rows]
    for one, row in zip(found, rows, strict=True):
        stop = len(RANKS) if row["abstained_at"] is None else RANKS.index(row["abstained_at"])
        assert one["scientificName"] == (row[RANKS[stop - 1]] if stop else "incertae sedis")
        assert one["taxonRank"] == (RANKS[stop - 1] if stop else "")
        assert bool(one["scientificNameID"]) == (stop in (0, len(RANKS)))
        assert row["nearest_id"] in one["identificationRemarks"]
    assert call("identify", *flags, "--output", tmp_path / "b.tsv").returncode == 2
    assert not (tmp_path / "b.tsv").exists()


@pytest.mark.slow
def test_a_killed_run_continues_after_its_last_block(judged, tmp_path: Path, monkeypatch):
    world, _ = judged
    ask(world, world.queries, whole := tmp_path / "whole.parquet", check_recall=40)
    monkeypatch.setattr("bioscan_jax.matching.queries._BLOCK_ROWS", 128)
    summary = ask(world, world.queries, tmp_path / "blocks.parquet", check_recall=40)
    seen: list[int] = []

    def stopping(matcher, texts, *rest):
        seen.append(len(texts))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return candidates.nearest_evidence(matcher, texts, *rest)

    monkeypatch.setattr("bioscan_jax.matching.identify.nearest_evidence", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask(world, world.queries, output := tmp_path / "a.parquet", check_recall=40)
    assert not output.exists()
    assert len(list((tmp_path / ".a.parquet.blocks").glob("*.parquet"))) == 2
    again = ask(world, world.queries, output, check_recall=40)
    assert sum(seen) == 128 + again.queries  # the third block twice
    assert output.read_bytes() == (tmp_path / "blocks.parquet").read_bytes()
    assert (again.by_rank, again.recall) == (summary.by_rank, summary.recall)
    names = ["sequence_id", *RANKS, "nearest_id", "strand"]
    assert pq.read_table(output).select(names).equals(pq.read_table(whole).select(names))
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "blocks.parquet", "a.parquet"}


@pytest.mark.slow
def test_another_machine_continues_a_run_into_a_bucket_that_failed(judged, tmp_path: Path, monkeypatch):
    world, _ = judged
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.setattr("bioscan_jax.matching.queries._BLOCK_ROWS", 128)
    ask(world, world.queries, tmp_path / "whole.parquet")
    seen: list[int] = []

    def failing(matcher, texts, *rest):
        seen.append(len(texts))
        if len(seen) == 3:
            raise InputError("the disk of the reference is gone")
        return candidates.nearest_evidence(matcher, texts, *rest)

    monkeypatch.setattr("bioscan_jax.matching.identify.nearest_evidence", failing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    output = "memory://bucket/names/a.parquet"
    try:
        with pytest.raises(InputError, match="the disk of the reference is gone"):
            ask(world, world.queries, output)
        assert len(memory.glob("/bucket/names/.a.parquet.blocks/*.parquet")) == 2
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
        again = ask(world, world.queries, output)
        assert sum(seen) == 128 + again.queries
        assert memory.find("/bucket") == ["/bucket/names/a.parquet"]
        assert memory.cat_file("/bucket/names/a.parquet") == (tmp_path / "whole.parquet").read_bytes()
    finally:
        memory.store.clear()


def test_an_archive_refuses_ids_that_repeat(world: World, tmp_path: Path):
    (tmp_path / "q.fasta").write_text(">a\nACGTAC\n>a\nACGTAA\n")
    with pytest.raises(InputError, match=r"sequence_id 'a' is not unique: .* pass --query.id header"):
        ask(world, str(tmp_path / "q.fasta"), tmp_path / "names.dwca.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["q.fasta"]


def test_a_row_without_a_vector_has_only_its_id(world: World, tmp_path: Path):
    given = pq.read_table(world.queries).slice(0, 3).to_pylist()
    given[1]["dna_sequence"] = "NNNN"
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "in.parquet")
    summary = ask(world, str(tmp_path / "in.parquet"), tmp_path / "a.parquet")
    assert sum(summary.rejects.values()) == 1
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["sequence_id"] for row in rows] == [row["sequence_id"] for row in given]
    assert {name for name, value in rows[1].items() if value is not None} == {"sequence_id"}
    assert rows[0]["species"] is not None


def test_another_model_is_refused(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="was made by another model \\(weights_sha256 "):
        ask(world, world.fasta, tmp_path / "a.parquet", model=config.ModelConfig(checkpoint="random:tiny-v2", seed=4))
    with pytest.raises(InputError, match="was made by another model"):
        open_table(world.uri, model=config.ModelConfig(checkpoint="random:tiny-v1")).search("ACGT" * 20)


def test_a_table_whose_phases_did_not_restart_after_an_n_is_said_to_be_old(world: World, tmp_path: Path, caplog):
    shutil.copytree(world.uri, tmp_path / "old")
    open_table(str(tmp_path / "old")).search("ACGT" * 20)
    assert "embed it again" not in caplog.text
    table = lance.dataset(str(next((tmp_path / "old").glob("*.lance"))))
    plan = json.loads(table.schema.metadata[b"plan_facts"])
    assert plan["embed"].pop("phase_of") == "stretch"
    table.update_schema_metadata({"plan_facts": json.dumps(plan)})
    open_table(str(tmp_path / "old")).search("ACGT" * 20)
    assert "sequences with N are not like those of the queries; embed it again" in caplog.text


def test_search_finds_a_row_by_its_dna(world: World):
    table = open_table(world.uri)
    rows = lance.dataset(f"{world.uri}/sequences.lance").to_table(columns=["sequence_id", "dna_sequence"]).slice(0, 2)
    one, two = rows["dna_sequence"].to_pylist()
    found = table.search([one, two[::-1].translate(str.maketrans("ACGT", "TGCA"))], k=3)
    assert found["strand"].to_pylist() == ["+"] * 3 + ["-"] * 3
    assert found.num_rows == 6
    assert found.column_names[0] == "query"
    assert "vector" not in found.column_names
    first = found.to_pylist()[::3]
    assert [row["sequence_id"] for row in first] == rows["sequence_id"].to_pylist()
    assert all(row["similarity"] > 0.9999 for row in first)
    family = first[0]["family"]
    other = table.search(one, k=3, filter=f"family != '{family}'", columns=["family"])
    assert other.column_names == ["query", "family", "similarity", "strand"]
    assert family not in other["family"].to_pylist()
    with pytest.raises(InputError, match="has no column 'depht'; choose from: "):
        table.search("ACGT" * 20, columns=["depht"])
    with pytest.raises(InputError, match=r"sequence 0 \('protein'\) has no vector"):
        table.search("protein")


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("identify", ["--output={tmp}/a.parquet", "--query.path={tmp}/none.fasta"], "none.fasta"),
        (
            "identify",
            ["--output={tmp}/a.csv", "--query.path={fasta}"],
            "pass FILE.parquet, FILE.tsv, FILE.sintax or FILE.dwca.zip",
        ),
        ("identify", ["--output={tmp}/no/a.tsv", "--query.path={fasta}"], "there is no directory"),
        ("identify", ["--output={fasta}", "--format=tsv", "--query.path={fasta}"], "is a file that the command reads"),
        ("identify", ["--output={tmp}/a.tsv", "--query.path={fasta}", "--k=0"], "--k 0 is too small"),
        ("identify", ["--output={tmp}/a.tsv", "--query.path={fasta}", "--search=index"], "has no vector index"),
        ("identify", ["--output={tmp}/a.tsv", "--query.path={fasta}", "--reference.table=x"], "has no table 'x'"),
        ("search", ["ACGTACGT", "--filter=1=1; DROP TABLE sequences"], "DROP TABLE sequences' is no SQL condition"),
        ("search", [], "sequence"),
        ("calibrate", ["--query.path={fasta}", "--precision=2"], "--precision 2.0 is outside 0 to 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world: World, tmp_path: Path, name: str, flags: list[str], words: str):
    given = [flag.format(tmp=tmp_path, fasta=world.fasta) for flag in flags]
    where = [] if any("reference.uri" in flag for flag in flags) else [f"--reference.uri={world.uri}"]
    done = call(name, *given, *where)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_commands_print_what_they_found(world: World, tmp_path: Path):
    output = tmp_path / "a.tsv"
    flags = [f"--reference.uri={world.uri}", f"--query.path={world.fasta}", f"--output={output}", "--rerank=alignment"]
    command = [sys.executable, str(SCRIPTS / "identify.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"answers  {output}" in done.stdout
    assert len(output.read_text().splitlines()) == 21
    done = call("search", "ACGTTGCA" * 20, f"--reference.uri={world.uri}", "--k=4")
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "SIM1-" in line]) == 4
