"""Fitting a projection: moments, whitening, the choice by held-out species, the network's resume, and errors."""

import dataclasses
import json
import shutil

import fsspec
import jax.numpy as jnp
import lance
import numpy as np
import pyarrow as pa
import pytest
from support.commands import call
from support.labelled_tables import clustered, write_labelled
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import read_lineages
from bioscan_jax.checkpoints.projection_files import read_projection
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_copy
from bioscan_jax.training import metric, metric_moments, metric_network
from bioscan_jax.training.metric import fit_metric
from bioscan_jax.training.metric_moments import GENUS, KEPT, SEEN_SPECIES, SPECIES, UNSEEN_GENUS, UNSEEN_SPECIES

SCATTERS: tuple[metric_moments.Scatter, ...] = ("genus", "both", "species", "family")
NETWORK = config.MetricConfig(
    components=16,
    shrinkage=0.1,
    scatter="genus",
    network=True,
    hidden=8,
    width=8,
    steps=12,
    species_per_batch=40,
    evaluate_every=4,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, LabelSpace, np.ndarray]:
    """Vectors, their taxa, and the codes of each row; every seventh row has no species."""
    vectors, lineages = clustered()
    lineages = [one.rsplit(";", 1)[0] + ";" if i % 7 == 0 else one for i, one in enumerate(lineages)]
    table = pa.table({"taxonomy": lineages})
    space = LabelSpace.build([table])
    return vectors, space, space.encode(read_lineages(table))


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return write_labelled(tmp_path_factory.mktemp("table") / "db", *clustered())


def collected(data, size: int) -> metric_moments.Statistics:
    vectors, space, taxa = data
    held = metric_moments.hold_out(space, 0.3, 1)
    blocks = [(vectors[i : i + size], taxa[i : i + size]) for i in range(0, len(vectors), size)]
    return metric_moments.collect(blocks, space, held, sample_rows=100, seed=0)


def fit(uri: str, tmp_path, name: str = "fitted", **changed) -> metric.MetricSummary:
    settings = dataclasses.replace(config.MetricConfig(components=16), **changed)
    return fit_metric(config.ReferenceConfig(uri=uri), str(tmp_path / name), settings, progress=False)


def files(directory) -> dict[str, bytes]:
    """The bytes of a projection's files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != metric.RECORD_FILE}


def test_moments_equal_those_of_the_whole_matrix(data):
    vectors, space, taxa = data
    found = collected(data, 37)
    everything = found.labelled + found.queries + found.unlabelled
    np.testing.assert_allclose(everything.mean, vectors.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        everything.covariance, np.cov(vectors.astype(float).T, bias=True), rtol=1e-10, atol=1e-10
    )
    assert everything.rows == len(vectors)
    for one in range(len(space.names[SPECIES])):
        rows = taxa[:, SPECIES] == one
        sums = found.species.sums[one] + rows.sum() * found.labelled.shift
        np.testing.assert_allclose(sums, vectors[rows].astype(float).sum(0), rtol=1e-10, atol=1e-10)
        assert found.species.rows[one] == rows.sum()


def test_other_batch_sizes_give_equal_results(data):
    one, other = collected(data, 480), collected(data, 13)
    pairs = [(one.with_all(SCATTERS, 24), other.with_all(SCATTERS, 24))]
    pairs.append((one.without_queries(SCATTERS, 24), other.without_queries(SCATTERS, 24)))
    for a, b in pairs:
        np.testing.assert_allclose(a.mean, b.mean, atol=1e-10)
        np.testing.assert_allclose(a.variances, b.variances, rtol=1e-10)
        for kind in a.scatters:
            np.testing.assert_allclose(a.scatters[kind], b.scatters[kind], atol=1e-10)
        np.testing.assert_allclose(a.whitening("genus", 12, 0.1, 12), b.whitening("genus", 12, 0.1, 12), atol=1e-9)
    for role in one.samples:
        for a, b in zip(one.samples[role].finish(), other.samples[role].finish(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_statistics_without_the_held_out_rows_are_those_of_the_rest(data):
    vectors, space, taxa = data
    found = collected(data, 50)
    form = found.without_queries(("genus", "species"), 24)
    held, species = found.held, taxa[:, SPECIES]
    first = {one: np.flatnonzero(species == one)[0] for one in np.flatnonzero(held.seen).tolist()}
    rest = (species >= 0) & (held.roles[species] == KEPT)
    rest[list(first.values())] = False
    kept, own = vectors[rest].astype(float), species[rest]
    np.testing.assert_allclose(form.mean, kept.mean(0), rtol=1e-10)
    np.testing.assert_allclose(form.variances, np.linalg.eigvalsh(np.cov(kept.T, bias=True))[::-1], rtol=1e-8)
    means = {one: kept[own == one].mean(0) for one in set(own.tolist())}
    away, inside = [], kept - np.array([means[one] for one in own.tolist()])
    for genus in set(space.paths[SPECIES][list(means), GENUS].tolist()):
        members = np.array([m for one, m in means.items() if space.paths[SPECIES][one, GENUS] == genus])
        if len(members) > 1:
            away.append(members - members.mean(0))
    away = np.concatenate(away)
    between, within = away.T @ away / len(away), inside.T @ inside / (len(kept) - len(means))
    for found_scatter, wanted in ((form.scatters["genus"], between), (form.scatters["species"], within)):
        np.testing.assert_allclose(form.axes @ found_scatter @ form.axes.T, wanted, atol=1e-9)


def test_whitening_makes_the_scatter_the_identity_without_shrinkage(data):
    form = collected(data, 50).with_all(SCATTERS, 24)
    for kind in form.scatters:
        map_ = form.whitening(kind, 10, 0.0, 10)
        np.testing.assert_allclose(map_.T @ form.scatters[kind][:10, :10] @ map_, np.eye(10), atol=1e-9)
        total = map_.T * form.variances[:10] @ map_
        np.testing.assert_allclose(total, np.diag(np.diag(total)), atol=1e-8 * total.max())
        assert (np.diff(np.diag(total)) <= 0).all()
        np.testing.assert_array_equal(form.whitening(kind, 10, 0.0, 4), map_[:, :4])


def test_held_out_taxa_leave_what_they_are_compared_with(data):
    _, space, _ = data
    held = metric_moments.hold_out(space, 0.3, 5)
    paths = space.paths[SPECIES]
    unseen, genera = held.roles == UNSEEN_SPECIES, held.roles == UNSEEN_GENUS
    kept = paths[held.roles == KEPT]
    assert unseen.any()
    assert genera.any()
    assert held.seen.any()
    assert set(paths[unseen, GENUS]) <= set(kept[:, GENUS])
    assert not set(paths[genera, GENUS]) & set(kept[:, GENUS])
    assert set(paths[genera, GENUS - 1]) <= set(kept[:, GENUS - 1])
    assert (held.roles[held.seen] == KEPT).all()
    assert (space.counts[SPECIES][held.seen] > 1).all()
    again, other = metric_moments.hold_out(space, 0.3, 5), metric_moments.hold_out(space, 0.3, 6)
    np.testing.assert_array_equal(held.roles, again.roles)
    assert (held.roles != other.roles).any()


def test_a_sample_takes_every_species_first():
    rng = np.random.default_rng(0)
    species = np.concatenate([np.zeros(500, np.int32), np.arange(1, 40, dtype=np.int32)])
    species = species[rng.permutation(len(species))]
    vectors = np.arange(len(species), dtype=np.float32)[:, None]
    for size in (539, 10):
        sample, counts = metric_moments.Sample(60, 1, 3), metric_moments.SpeciesSums.zeros(40, 1)
        for at in range(0, len(species), size):
            own = species[at : at + size]
            rows = np.arange(at, at + len(own))
            sample.add(rows, own, counts.add(own, np.zeros((len(own), 1))), lambda i, at=at: vectors[at + i])
        values, found = sample.finish()
        assert len(found) == 60
        assert set(found) == set(range(40))
        np.testing.assert_array_equal(species[values[:, 0].astype(int)], found)


def test_devices_multiply_as_the_host_does():
    centred = np.random.default_rng(0).normal(size=(1000, 12))
    found = metric.device_products(make_layout(config.MeshConfig(compilation_cache=None)))(centred)
    np.testing.assert_allclose(found, metric_moments.host_products(centred), rtol=1e-5, atol=1e-3)


def test_a_fit_finds_the_genera_and_repeats_to_the_bit(uri, tmp_path):
    summary = fit(uri, tmp_path, components=None)
    assert summary.projected.genus > summary.raw.genus + 0.2
    assert {one.scatter for one in summary.tries} == set(SCATTERS)
    assert len({one.shrinkage for one in summary.tries}) == 5
    assert "chosen" in str(summary)
    assert "raw vectors" in str(summary)
    projection = read_projection(tmp_path / "fitted")
    assert projection.sha256 == summary.projection_sha256
    assert projection.inputs.phases == 6
    assert projection.inputs.weights_sha256 == "w" * 64
    record = json.loads((tmp_path / "fitted" / metric.RECORD_FILE).read_text())
    assert record["fingerprint"]["table"]["rows"] == 480
    assert record["projected"]["genus"] == summary.projected.genus
    again = fit(uri, tmp_path, "again", components=None)
    assert again.tries == summary.tries
    assert files(tmp_path / "again") == files(tmp_path / "fitted")


def test_the_files_of_a_table_do_not_matter(uri, data, tmp_path, monkeypatch):
    monkeypatch.setattr(metric, "_BLOCK_ROWS", 150)
    path = shutil.copytree(uri, tmp_path / "parts") / "sequences.lance"
    lance.write_dataset(lance.dataset(str(path)).to_table(), str(path), mode="overwrite", max_rows_per_file=100)
    with tqdm(disable=True) as bar:
        blocks = list(metric._blocks(lance.dataset(str(path)), None, data[1], bar))
    assert [len(vectors) for vectors, _ in blocks] == [150, 150, 150, 30]


def test_given_settings_are_not_searched(uri, tmp_path):
    summary = fit(uri, tmp_path, components=8, shrinkage=0.25, scatter="family", dimensions=5)
    assert [(one.components, one.shrinkage, one.scatter) for one in summary.tries] == [(8, 0.25, "family")]
    assert summary.dimension == 5


def test_rank_columns_serve_as_the_lineage_does(uri, tmp_path):
    columns = write_labelled(tmp_path / "db", *clustered(), columns=True)
    fit(uri, tmp_path, "lineage", shrinkage=0.1)
    fit(columns, tmp_path, "columns", shrinkage=0.1)
    assert files(tmp_path / "lineage") == files(tmp_path / "columns")
    lance.dataset(f"{columns}/sequences.lance").drop_columns(["kingdom"])  # as BIOSCAN-5M has them
    fit(columns, tmp_path, "some", shrinkage=0.1)
    assert files(tmp_path / "lineage") == files(tmp_path / "some")


def test_the_network_continues_to_the_same_bits_in_a_bucket(uri, tmp_path, monkeypatch):
    parts_url = "memory://metric/parts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reference = config.ReferenceConfig(uri=uri)
    whole = fit_metric(reference, str(tmp_path / "whole"), NETWORK, progress=False)
    assert whole.network is not None
    assert whole.network["steps"] % 4 == 0
    assert not (tmp_path / "whole.run").exists()

    for stop_at in (3, 7, 6):  # in the search twice, then in the training on all rows
        steps = {"left": stop_at}
        draw = metric_network.Rows.draw

        def interrupted(self, *given, steps=steps, draw=draw):
            steps["left"] -= 1
            if steps["left"] < 0:
                raise KeyboardInterrupt
            return draw(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(metric_network.Rows, "draw", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fit_metric(reference, parts_url, NETWORK, progress=False)
    other = dataclasses.replace(NETWORK, scale=8.0)
    with pytest.raises(InputError, match="other settings.*scale"):
        fit_metric(reference, parts_url, other, progress=False)
    parts = fit_metric(reference, parts_url, NETWORK, progress=False)
    assert parts.network == whole.network
    assert files(local_copy(parts_url, "output")) == files(tmp_path / "whole")
    assert not fsspec.filesystem("memory").exists("metric/parts.run")


def test_the_projection_of_a_network_gives_the_trained_outputs(uri, tmp_path):
    settings = dataclasses.replace(NETWORK, weight=0.5)
    summary = fit_metric(config.ReferenceConfig(uri=uri), str(tmp_path / "fitted"), settings, progress=False)
    projection = read_projection(tmp_path / "fitted")
    assert projection.weights == (0.5, 1.0)
    assert projection.dimension == summary.dimension == 24
    vectors, _ = clustered()
    whitened = (vectors - projection.mean) @ projection.linear
    length = 1 / np.sqrt(np.mean(whitened**2))
    params = {name: getattr(projection.networks[0], name) for name in ("skip", "w1", "b1", "w2")}
    params |= {name: params[name] / length for name in ("skip", "w1")}
    network = np.asarray(metric_network.network_outputs(params, whitened * length))
    plain = whitened / np.linalg.norm(whitened, axis=1, keepdims=True)
    wanted = np.concatenate([0.5 * plain, network], axis=1) / np.sqrt(1.25)
    np.testing.assert_allclose(np.asarray(projection(jnp.asarray(vectors))), wanted, atol=2e-5)


def test_a_draw_takes_whole_genera_and_two_rows_of_each_species(data):
    vectors, space, taxa = data
    known = taxa[:, SPECIES] >= 0
    rows = metric_network.Rows(vectors[known], taxa[known, SPECIES], space.paths[SPECIES])
    first, second, drawn = rows.draw(10, 0, 3)
    assert len({tuple(row) for row in drawn.tolist()}) == 10
    assert len(set(drawn[:, GENUS])) <= 3
    assert not (first == second).all(axis=1).any()
    for a, b in zip(rows.draw(10, 0, 3), (first, second, drawn), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (rows.draw(10, 0, 4)[0] != first).any()


def _nan(vectors, lineages):
    vectors[17, 3] = np.nan
    return vectors, lineages


def _one_species(vectors, lineages):
    return vectors, [";".join([*one.split(";")[:5], f"G{i % 9}", f"G{i % 9} unus"]) for i, one in enumerate(lineages)]


@pytest.mark.parametrize(
    ("change", "table", "settings", "words"),
    [
        (_nan, {}, {}, "row 17 has values that are not numbers"),
        (_one_species, {}, {}, "none of the 9 genera has two labelled species"),
        (lambda v, t: (v, None), {}, {}, "no labels.*taxonomy"),
        (lambda v, t: (v, [None] * len(t)), {}, {}, "none of the 480 rows has a known name"),
        (lambda v, t: (v[:20], t[:20]), {}, {}, "20 rows are fewer than needed.*24 dimensions"),
        (lambda v, t: (v, t), {}, {"components": 25}, "--components 25 is too many"),
        (lambda v, t: (v, t), {"finish": False}, {}, "unfinished"),
        (
            lambda v, t: (v, t),
            {"plan": {"projection_sha256": "p" * 64}},
            {},
            "projected vectors.*--model.projection none",
        ),
        (lambda v, t: (v, t), {}, {"filter": "nothing = 3"}, "--filter.*not a condition"),
        (lambda v, t: (v, t), {}, {"filter": "sequence_id = 'x'"}, "no rows where"),
        (
            lambda v, t: (np.repeat(v[:, :3], 8, axis=1), t),
            {},
            {"shrinkage": 0.0, "components": 24},
            "singular.*larger",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(change, table, settings, words, tmp_path):
    uri = write_labelled(tmp_path / "db", *change(*clustered()), **table)
    with pytest.raises(InputError, match=words) as caught:
        fit(uri, tmp_path, **{"components": None} | settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fitted").exists()


def test_the_command_prints_the_tries_and_keeps_what_exists(uri, tmp_path):
    words = ["--reference.uri", uri, "--components", 12, "--shrinkage", 0.1, "--output", tmp_path / "out"]
    done = call("fit-metric", *words)
    assert done.returncode == 0, done.stderr
    assert "chosen" in done.stdout
    assert "raw vectors" in done.stdout
    again = call("fit-metric", *words)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert again.stderr.count("\n") == 1
    assert "outside 0 to 1" in call("fit-metric", *words, "--shrinkage", 2).stderr


def test_queries_of_each_kind_are_found(data):
    found = collected(data, 50)
    for role in (UNSEEN_SPECIES, UNSEEN_GENUS, SEEN_SPECIES):
        vectors, species = found.samples[role].finish()
        assert len(vectors) == len(species) > 0
