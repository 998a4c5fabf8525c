"""Fits a projection to a vector table and its labels, so that the nearest neighbour shares the taxon."""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int32
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import lineage_columns, missing_lineages, read_lineages
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.model_card import data_facts, write_facts
from bioscan_jax.checkpoints.projection_files import write_projection
from bioscan_jax.devices.sharding import Layout, make_layout, start_devices
from bioscan_jax.embedding.encoder import unit
from bioscan_jax.embedding.summary import peak_host_bytes, versions
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import output_directory, remove_tree
from bioscan_jax.model.projection import Projection, ProjectionInputs
from bioscan_jax.notebook import Shown, progress_bar
from bioscan_jax.output import whole_directory
from bioscan_jax.table.reading import check_condition, check_finished, open_existing, schema_metadata
from bioscan_jax.table.storage import storage_errors
from bioscan_jax.training.metric_moments import (
    GENUS,
    KEPT,
    QUERIES,
    SPECIES,
    Accuracy,
    ClosedForm,
    Products,
    Sample,
    Scatter,
    SpeciesSums,
    accuracy,
    collect,
    hold_out,
    host_products,
)
from bioscan_jax.training.metric_network import Params, Rows, Run, as_network, network_outputs

if TYPE_CHECKING:
    import lance

RECORD_FILE = "fit_metric.json"
_BLOCK_ROWS = 4096
_BLOCK_BYTES = 16 << 20
"""Vectors read at once; Lance reads about 16 such blocks ahead."""
_PADDED_ROWS = 1024
_COMPONENTS = (128, 256, 512, 768, 1024, 1536)
_DIMENSIONS = 1024
"""Longest whitened vector, unless another is asked for."""
_SHRINKAGES = (0.03, 0.1, 0.2, 0.3, 0.5)
_SCATTERS: tuple[Scatter, ...] = ("genus", "both", "species", "family")
_START = {"components": 512, "shrinkage": 0.1}
"""Where the search for the scatter begins."""
_WEIGHTS = (0.0, 0.35, 0.5, 0.7, 1.0)
"""Weights of the whitened vector beside the network's."""

Part = tuple[Float32[np.ndarray, "_ _"], Int32[np.ndarray, " _"]]


@dataclass(frozen=True, kw_only=True)
class Try:
    """One setting, and what it is worth on the held-out species."""

    scatter: Scatter
    components: int
    shrinkage: float
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class MetricSummary(Shown):
    """What `fit_metric` did.

    Example:
        >>> import bioscan_jax as bj
        >>> bj.MetricSummary.__name__
        'MetricSummary'
    """

    output: str
    """Directory of the projection."""
    table: str
    rows: int
    labelled: int
    """Rows with a known species."""
    species: int
    genera: int
    features: int
    """Numbers per raw vector."""
    dimension: int
    """Numbers per projected vector."""
    chosen: Try
    """Settings of the closed form."""
    raw: Accuracy
    """Held-out species named by the vectors as they are."""
    projected: Accuracy
    """The same by a projection fitted without them."""
    tries: tuple[Try, ...]
    network: dict[str, Any] | None
    """Steps, weight of the whitened part, and the figures of each evaluation; None without a network."""
    projection_sha256: str
    fingerprint: dict[str, Any]
    """What determines the projection: table, settings and versions."""
    seconds: dict[str, float]
    peak_host_bytes: int

    def to_json(self) -> str:
        """Returns every field as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        """Formats the summary as the lines printed at the end."""
        head = f"{'scatter':>9} {'axes':>5} {'shrinkage':>9}   genus    macro  species   family    order"
        lines = [head]
        for one in self.tries:
            mark = "  chosen" if one == self.chosen else ""
            lines.append(f"{one.scatter:>9} {one.components:>5} {one.shrinkage:>9g}  {one.accuracy}{mark}")
        lines += ["", f"{'raw vectors':>25}  {self.raw}", f"{'projected':>25}  {self.projected}", ""]
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        lines.append(
            "held-out rows whose nearest neighbour shares the genus (unseen species; macro: each species alike), the "
            "species (seen), the family and the order (unseen genera)"
        )
        if self.network is not None:
            lines.append(f"network   {self.network['steps']} steps, whitened part weighs {self.network['weight']:g}")
        return "\n".join(
            [
                *lines,
                f"fitted on {self.rows:,} rows, {self.labelled:,} of {self.species:,} species in {self.genera:,} genera",
                f"projected {self.features:,} to {self.dimension:,} dimensions",
                f"seconds   {seconds}",
                f"memory    host {self.peak_host_bytes / 2**30:.2f} GiB",
                f"output    {self.output}",
            ]
        )


def fit_metric(
    reference: config.ReferenceConfig,
    output: str,
    settings: config.MetricConfig = config.MetricConfig(),  # noqa: B008 - frozen
    *,
    mesh: config.MeshConfig = config.MeshConfig(),  # noqa: B008 - frozen
    progress: bool = True,
) -> MetricSummary:
    """Fits a projection to a table of raw vectors: centre, whitening and, on request, a residual network.

    The closed form takes one pass over the table, and repeats to the bit on the same machine. Settings that are absent
    are chosen by species, genera and single rows held out inside the table.

    Args:
        reference: A table with labels, as embed makes it.
        output: Directory or URL to make. A run with a network keeps its checkpoints in OUTPUT.run until it is done.
        settings: How to fit.
        mesh: Which devices compute the products of vectors; on CPU NumPy does, in float64.
        progress: Show progress bars on stderr.

    Raises:
        InputError: The table has no labels, no genus with two species, fewer rows than dimensions, vectors that are not
            numbers or already projected, or is unfinished; or `output` exists or cannot be written.

    Example:
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> _ = write_simulated("barcodes.parquet", species=60, per_species=4, length=200, seed=0)
        >>> _ = bj.embed(
        ...     bj.ModelConfig(checkpoint="random:tiny-v2"),
        ...     bj.DataConfig(path="barcodes.parquet"),
        ...     bj.SinkConfig(uri="vectors"),
        ...     bj.EmbedConfig(layer=0, phases=6),
        ...     progress=False,
        ... )
        >>> fitted = bj.fit_metric(
        ...     bj.ReferenceConfig(uri="vectors"), "metric", bj.MetricConfig(components=16), progress=False
        ... )
        >>> fitted.dimension
        16
    """
    if mesh.distributed:
        raise InputError("--mesh.distributed true: fit-metric runs in one process, on its own devices; leave it out")
    if settings.network and output.startswith("rclone:"):
        raise InputError(
            f"--output {output}: a network's checkpoints are kept beside it, which rclone cannot; pass a directory or an "
            "fsspec URL"
        )
    with output_directory(output) as directory:
        return _fit(reference, output, directory, settings, mesh, progress)


def _fit(
    reference: config.ReferenceConfig,
    output: str,
    directory: Path,
    settings: config.MetricConfig,
    mesh: config.MeshConfig,
    progress: bool,
) -> MetricSummary:
    """Fits the projection and writes it to a directory, which becomes `output`."""
    clock = _Clock()
    dataset, condition, inputs = _open(reference, settings)
    rows = _count(dataset, condition)
    features = dataset.schema.field("vector").type.list_size
    _check_sizes(dataset.uri, rows, features, settings)
    space = LabelSpace.build(_labels(dataset, condition))
    held = hold_out(space, settings.held_out, settings.seed)
    start_devices(mesh)
    layout = make_layout(mesh)
    clock.mark("labels")

    with progress_bar(total=rows, unit="row", desc="moments", disable=not progress) as bar:
        found = collect(
            _blocks(dataset, condition, space, bar),
            space,
            held,
            sample_rows=settings.sample_rows,
            seed=settings.seed,
            products=_products(layout),
        )
    clock.mark("pass")
    parts = {role: sample.finish() for role, sample in found.samples.items()}
    paths = space.paths[SPECIES]
    raw = accuracy(parts, paths)
    most = settings.components or min(features, found.labelled.rows - 1, max(_COMPONENTS))
    kinds = (settings.scatter,) if settings.scatter else _SCATTERS
    fold = found.without_queries(kinds, most)
    axes = {
        role: ((v - fold.mean.astype(np.float32)) @ fold.axes.astype(np.float32), s) for role, (v, s) in parts.items()
    }
    chosen, tries = _search(fold, axes, paths, settings, most, progress)
    clock.mark("search")
    final = found.with_all((chosen.scatter,), chosen.components)
    linear = final.axes @ _whitening(final, chosen, settings)
    clock.mark("solve")

    identity = _fingerprint(dataset, rows, space, settings)
    networks, weights, about, projected = (), (1.0,), None, chosen.accuracy
    run = f"{output}.run"
    if settings.network:
        map_ = _whitening(fold, chosen, settings).astype(np.float32)
        whitened = {role: (v[:, : chosen.components] @ map_, s) for role, (v, s) in axes.items()}
        best, projected, history = _search_network(whitened, paths, settings, run, identity, progress)
        with progress_bar(total=rows, unit="row", desc="whiten", disable=not progress) as bar:
            vectors, species = _whitened_rows(
                _blocks(dataset, condition, space, bar), final.mean, linear, space, settings
            )
        length = _length(vectors)
        trained = Run(f"{run}/final.npz", identity | {"steps": best["step"]}, settings).train(
            Rows(vectors * length, species, paths), int(best["step"]), description="train", progress=progress
        )
        networks, weights = (as_network(trained, float(length)),), (best["weight"], 1.0)
        about = {"steps": int(best["step"]), "weight": best["weight"], "rows": len(vectors), "evaluations": history}
        if not projected.better_than(chosen.accuracy):
            logger.warning("the network names the held-out species no better than the closed form alone; leave it out")
        clock.mark("network")

    description = (
        f"fit-metric on {rows:,} barcodes of {len(paths):,} species ({chosen.components} axes, scatter "
        f"{chosen.scatter}, shrinkage {chosen.shrinkage:g}{', network' if networks else ''}). The nearest neighbour has "
        f"the right genus for {projected.genus:.1%} of barcodes whose species was held out ({raw.genus:.1%} before)"
    )
    projection = Projection(
        mean=final.mean.astype(np.float32),
        linear=linear.astype(np.float32),
        networks=networks,
        weights=weights,
        inputs=inputs,
        description=description,
    )
    summary = MetricSummary(
        output=output,
        table=dataset.uri,
        rows=rows,
        labelled=int(found.species.rows.sum()),
        species=len(paths),
        genera=len(space.names[GENUS]),
        features=features,
        dimension=projection.dimension,
        chosen=chosen,
        raw=raw,
        projected=projected,
        tries=tuple(tries),
        network=about,
        projection_sha256=projection.sha256,
        fingerprint=identity | {"versions": versions()},
        seconds=clock.seconds,
        peak_host_bytes=peak_host_bytes(),
    )
    with whole_directory(directory) as partial:
        write_projection(partial, projection)
        write_facts(partial, "projection", _base(dataset), _card_facts(summary, dataset))
        (partial / RECORD_FILE).write_text(summary.to_json())
    remove_tree(run)
    return summary


def _base(dataset: "lance.LanceDataset") -> Provenance:
    """Returns the identity of the weights that made a table's vectors."""
    facts = schema_metadata(dataset)
    known: dict[str, Any] = {field.name: facts.get(field.name) for field in dataclasses.fields(Provenance)}
    weights = ProjectionInputs.from_plan(json.loads(facts["plan_facts"])).weights_sha256
    unnamed = {"model": "a model without a name", "dtype": "unknown", "weights_sha256": weights}
    return Provenance(**known | {name: value for name, value in unnamed.items() if known[name] is None})


def _card_facts(summary: MetricSummary, dataset: "lance.LanceDataset") -> dict[str, Any]:
    """Returns what the model card says of the data and of what the projection reached."""
    counts = {"barcodes": summary.rows, "species": summary.species, "genera": summary.genera}
    figures = {
        f"held out, {name.replace('_', ' ')} of the nearest neighbour{when}": value
        for when, found in ((" (raw vectors)", summary.raw), ("", summary.projected))
        for name, value in vars(found).items()
        if not np.isnan(value)
    }
    files = json.loads(schema_metadata(dataset)["plan_facts"]).get("input", [])
    return {"data": data_facts(files) | counts, "figures": figures}


class _Clock:
    """Wall seconds of consecutive stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def mark(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage], self._since = round(now - self._since, 2), now


def _open(
    reference: config.ReferenceConfig, settings: config.MetricConfig
) -> tuple["lance.LanceDataset", str | None, ProjectionInputs]:
    """Opens the table and checks that it holds raw vectors."""
    dataset = open_existing(reference.uri, reference.table)
    facts, schema = schema_metadata(dataset), dataset.schema
    if "vector" not in schema.names or "plan_facts" not in facts:
        raise InputError(f"{dataset.uri} is not a table of vectors with a record of what made them; pass one of embed")
    plan = json.loads(facts["plan_facts"])
    if facts.get("projection_sha256") or '"projection_sha256": "' in json.dumps(plan):
        raise InputError(
            f"{dataset.uri} has projected vectors; embed again with --model.projection none, and pass that table"
        )
    check_finished(reference.uri, reference.table, dataset)
    condition = None if settings.filter is None else check_condition(settings.filter)
    return dataset, condition, ProjectionInputs.from_plan(plan)


def _count(dataset: "lance.LanceDataset", condition: str | None) -> int:
    """Returns the number of rows that pass the filter."""
    try:
        rows = dataset.count_rows(condition)
    except (ValueError, OSError, NotImplementedError) as error:
        names = ", ".join(dataset.schema.names)
        raise InputError(f"--filter {condition!r} is not a condition on the table's columns ({names})") from error
    if not rows:
        raise InputError(f"{dataset.uri} has no rows{f' where {condition}' if condition else ''}; pass others")
    return rows


def _check_sizes(where: str, rows: int, features: int, settings: config.MetricConfig) -> None:
    if settings.components is not None and settings.components > min(features, rows - 1):
        raise InputError(
            f"--components {settings.components} is too many for {rows:,} rows of {features:,} dimensions in {where}; "
            f"pass at most {max(min(features, rows - 1), 1)}"
        )
    if settings.components is None and rows <= features:
        raise InputError(
            f"{where}: {rows:,} rows are fewer than needed for vectors of {features:,} dimensions; add rows, or pass "
            f"--components {max(rows // 2, 1)} or less"
        )


def _labels(dataset: "lance.LanceDataset", condition: str | None) -> Iterator[Any]:
    """Yields the label columns of the rows, in batches.

    Raises:
        InputError: The table has no labels.
    """
    columns = lineage_columns(dataset.schema.names)
    if not columns:
        raise missing_lineages(dataset.schema.names)
    with storage_errors(dataset.uri):
        yield from dataset.scanner(columns=columns, filter=condition, batch_size=65536, scan_in_order=True).to_batches()


def _blocks(
    dataset: "lance.LanceDataset", condition: str | None, space: LabelSpace, bar: tqdm
) -> Iterator[tuple[Float32[np.ndarray, "_ _"], Int32[np.ndarray, "_ 7"]]]:
    """Yields vectors and taxa of the rows, in batches of one size: sums do not depend on the table's files."""
    columns = ["vector", *lineage_columns(dataset.schema.names)]
    rows = min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * dataset.schema.field("vector").type.list_size))
    scanner = dataset.scanner(
        columns=columns, filter=condition, batch_size=rows, scan_in_order=True, strict_batch_size=True
    )
    with storage_errors(dataset.uri):
        for batch in scanner.to_batches():
            vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            yield vectors.reshape(len(batch), -1), space.encode(read_lineages(batch))
            bar.update(len(batch))


def _products(layout: Layout) -> Products:
    """Returns what computes the products of a block's columns.

    Accelerators have no fast float64: they multiply in float32 at the highest precision, a block at a time, split over
    the devices by rows; blocks are added in float64 on the host.
    """
    if layout.mesh.devices.flat[0].platform == "cpu":
        return host_products
    return device_products(layout)


def device_products(layout: Layout) -> Products:
    """Returns a function that computes the products of a block's columns on the layout's devices."""
    sharding = layout.batched(2)
    multiply = jax.jit(
        lambda x: jnp.matmul(x.T, x, precision="highest", preferred_element_type=jnp.float32),
        out_shardings=jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec()),
    )

    def products(centred: Float64[np.ndarray, "rows d"]) -> Float32[np.ndarray, "d d"]:
        rows = -len(centred) % _PADDED_ROWS  # few compiled shapes; rows of zeros add nothing
        padded = np.pad(centred.astype(np.float32), ((0, rows), (0, 0)))
        return np.asarray(multiply(jax.device_put(padded, sharding)))

    return products


def _whitening(form: ClosedForm, chosen: Try, settings: config.MetricConfig) -> Float64[np.ndarray, "k m"]:
    return form.whitening(chosen.scatter, chosen.components, chosen.shrinkage, settings.dimensions or _DIMENSIONS)


def _search(
    fold: ClosedForm,
    axes: dict[int, Part],
    paths: Int32[np.ndarray, "species 7"],
    settings: config.MetricConfig,
    most: int,
    progress: bool,
) -> tuple[Try, list[Try]]:
    """Chooses scatter, number of axes, shrinkage, and the scatter once more; each by the genus of held-out species."""
    sizes = tuple(sorted({min(size, most) for size in _COMPONENTS} | {most}))
    options: dict[str, tuple[Any, ...]] = {
        "scatter": (settings.scatter,) if settings.scatter else _SCATTERS,
        "components": (settings.components,) if settings.components else sizes,
        "shrinkage": (settings.shrinkage,) if settings.shrinkage is not None else _SHRINKAGES,
    }
    at = {name: values[0] if len(values) == 1 else _START.get(name, values[0]) for name, values in options.items()}
    at["components"] = min(at["components"], most)
    best: Try | None = None
    tries: list[Try] = []
    with progress_bar(total=None, unit="try", desc="search", disable=not progress) as bar:
        for name, values in (*options.items(), ("scatter", options["scatter"])):
            for value in values:
                wanted = at | {name: value}
                if any(all(getattr(one, key) == wanted[key] for key in wanted) for one in tries):
                    continue
                k = wanted["components"]
                try:
                    map_ = fold.whitening(
                        wanted["scatter"], k, wanted["shrinkage"], settings.dimensions or _DIMENSIONS
                    ).astype(np.float32)
                except InputError:
                    if best is None:
                        raise
                    continue
                worth = accuracy({role: (v[:, :k] @ map_, s) for role, (v, s) in axes.items()}, paths)
                tries.append(Try(**wanted, accuracy=worth))
                bar.update()
                if best is None or worth.better_than(best.accuracy):
                    best = tries[-1]
            assert best is not None
            at[name] = getattr(best, name)
    assert best is not None
    return best, tries


def _length(vectors: Float32[np.ndarray, "n d"]) -> np.float32:
    """Returns the factor that gives the vectors a root mean square of 1 per coordinate."""
    return np.float32(1 / np.sqrt(np.mean(np.square(vectors, dtype=np.float64))))


def _search_network(
    whitened: dict[int, Part],
    paths: Int32[np.ndarray, "species 7"],
    settings: config.MetricConfig,
    run: str,
    identity: dict[str, Any],
    progress: bool,
) -> tuple[dict[str, float], Accuracy, list[dict[str, float]]]:
    """Trains on the kept rows; returns the evaluation that names the held-out species best, and all of them."""
    length = _length(whitened[KEPT][0])
    scaled = {role: (np.asarray(v * length, np.float32), s) for role, (v, s) in whitened.items()}
    plain = {role: unit(v) for role, (v, _) in scaled.items()}
    weights = _WEIGHTS if settings.weight is None else (settings.weight,)

    def evaluate(params: Params) -> dict[str, float]:
        own = {role: _in_blocks(params, v) for role, (v, _) in scaled.items()}
        best: tuple[float, Accuracy] | None = None
        for weight in weights:
            parts = {
                role: (np.concatenate([weight * plain[role], own[role]], 1) if weight else own[role], scaled[role][1])
                for role in (KEPT, *QUERIES)
            }
            worth = accuracy(parts, paths)
            if best is None or worth.better_than(best[1]):
                best = weight, worth
        assert best is not None
        return {"weight": best[0]} | dataclasses.asdict(best[1])

    trial = Run(f"{run}/search.npz", identity, settings)
    trial.train(
        Rows(*scaled[KEPT], paths), settings.steps, description="search steps", evaluate=evaluate, progress=progress
    )
    worths = [Accuracy(**{f.name: entry[f.name] for f in dataclasses.fields(Accuracy)}) for entry in trial.history]
    best = 0
    for i, worth in enumerate(worths):
        if worth.better_than(worths[best]):
            best = i
    return trial.history[best], worths[best], trial.history


def _in_blocks(params: Params, vectors: Float32[np.ndarray, "n mid"]) -> Float32[np.ndarray, "n out"]:
    """Returns the network's outputs, computed in blocks of one shape."""
    blocks = []
    for at in range(0, len(vectors), _BLOCK_ROWS):
        block = vectors[at : at + _BLOCK_ROWS]
        padded = np.pad(block, ((0, _BLOCK_ROWS - len(block)), (0, 0)))
        blocks.append(np.asarray(network_outputs(params, jnp.asarray(padded)))[: len(block)])
    return np.concatenate(blocks) if blocks else np.empty((0, params["w2"].shape[1]), np.float32)


def _whitened_rows(
    blocks: Iterator[tuple[Float32[np.ndarray, "_ _"], Int32[np.ndarray, "_ 7"]]],
    mean: Float64[np.ndarray, " d"],
    linear: Float64[np.ndarray, "d m"],
    space: LabelSpace,
    settings: config.MetricConfig,
) -> Part:
    """Returns whitened vectors and species of the rows that the network is trained on, in a second pass."""
    sample = Sample(settings.network_rows, linear.shape[1], settings.seed)
    counts = SpeciesSums.zeros(len(space.names[SPECIES]), 1)
    centre, map_ = mean.astype(np.float32), linear.astype(np.float32)
    at = 0
    for vectors, taxa in blocks:
        rows = np.flatnonzero(taxa[:, SPECIES] >= 0)
        species = taxa[rows, SPECIES]
        earlier = counts.add(species, np.zeros((len(rows), 1)))
        sample.add(at + rows, species, earlier, lambda i, r=rows, v=vectors: (v[r[i]] - centre) @ map_)
        at += len(vectors)
    return sample.finish()


def _fingerprint(
    dataset: "lance.LanceDataset", rows: int, space: LabelSpace, settings: config.MetricConfig
) -> dict[str, Any]:
    """Returns what determines the projection; where things lie, and how often they are saved, is not part of it."""
    facts = schema_metadata(dataset)
    kept = {name: value for name, value in vars(settings).items() if name != "checkpoint_every"}
    table = {name: facts.get(name) for name in ("plan", "weights_sha256", "model")}
    labels = {"label_space_sha256": space.sha256}
    return json.loads(json.dumps({"table": table | {"rows": rows} | labels, "settings": kept}))
