"""The optimizer step and the evaluation: jitted functions over sharded arrays.

Trained parameters, their gradients and the optimizer's moments are float32 and kept apart from the frozen parameters,
so that only they are differentiated and summed over the devices.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.hosts import any_process
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.model.classifier import Arrays, Classifier, is_new, named_arrays, with_arrays
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.heads import TaxonTree, predict
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.losses import (
    combine,
    contrastive_loss,
    known_rows,
    mask_tokens,
    masked_lm_loss,
    rank_losses,
    total_loss,
)
from bioscan_jax.training.metrics import (
    EmbeddingMoments,
    add_predictions,
    dashboard_metrics,
    embedding_moments,
    no_counts,
)

_T = TypeVar("_T")
_ONE_PART = 1 << 62
"""A token budget that no batch exceeds, so that it is never divided."""


class MicroBatches(NamedTuple):
    """A batch divided into equal micro-batches, computed one after another, each sharded over the devices."""

    ids: Int32[Array, "parts b s"]
    labels: Int32[Array, "parts b 7"]
    metadata: Float32[Array, "parts b 3"]


class StepMetrics(NamedTuple):
    """Metrics of one training step: float32, equal on every device."""

    loss: Float32[Array, ""]
    rank_losses: Float32[Array, "7"]
    """Mean loss of the sequences at each rank; 0 where no row is known, and for mlm."""
    known_rows: Float32[Array, "7"]
    """Rows known at each rank."""
    contrastive: Float32[Array, ""]
    """The contrastive loss before its weight; 0 without one."""
    gradient_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]
    finite: Bool[Array, ""]
    """Whether loss and gradient were finite; if not, the step changed nothing."""
    moments: EmbeddingMoments


class EvaluationSums(NamedTuple):
    """Sums over one evaluated batch."""

    loss_sums: Float32[Array, "kinds 7"]
    """Summed losses at each rank, of the sequences and of the metadata; for mlm only the first number is used."""
    counts: Float32[Array, "7"]
    """Rows known at each rank; for mlm the first number counts the predicted tokens."""
    predicted: Int32[Array, "b 7"]
    """Predicted taxa; -1 for mlm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainableModel:
    """A classifier split into trained and frozen parameters, with the settings of its training."""

    graph: nnx.GraphDef
    trained: nnx.State
    """The trained parameters; the step uses their paths and types, not their values."""
    frozen: nnx.State
    layout: Layout
    loss: config.LossConfig
    train: config.TrainConfig
    transformer: TransformerConfig
    tree: TaxonTree | None
    special_ids: tuple[int, ...]
    """Tokens that mlm never masks."""

    @property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """Shardings of the trained parameters, by dotted path."""
        found = stored_shardings(self.trained, self.layout)
        return {".".join(map(str, path)): sharding for path, sharding in found.items()}

    def merge(self, params: Arrays, frozen: nnx.State) -> Classifier:
        """Returns the classifier with these trained and frozen parameters."""
        return nnx.merge(self.graph, with_arrays(self.trained, params), frozen)


def split_trainable(
    classifier: Classifier,
    layout: Layout,
    loss: config.LossConfig,
    train: config.TrainConfig,
    *,
    tree: TaxonTree | None,
    special_ids: tuple[int, ...],
) -> TrainableModel:
    """Splits a classifier by what `train.mode` trains; its arrays may be abstract."""
    graph, trained, frozen = nnx.split(classifier, is_new if train.mode == "lora" else nnx.Param, ...)
    return TrainableModel(
        graph=graph,
        trained=trained,
        frozen=frozen,
        layout=layout,
        loss=loss,
        train=train,
        transformer=classifier.trunk.config,
        tree=tree,
        special_ids=special_ids,
    )


def learning_rate(train: config.TrainConfig, steps: int) -> optax.Schedule:
    """Returns a linear warm-up (over at most half of all steps) followed by a cosine down to 0."""
    warmup = min(train.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, warmup, steps)


def make_optimizer(train: config.TrainConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW after clipping by the global norm, without weight decay on biases and norms."""

    def decayed(params: Arrays) -> dict[str, bool]:
        return {name: name.rpartition(".")[2] not in ("bias", "scale") for name in params}

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(train, steps), weight_decay=train.weight_decay, mask=decayed),
    )


def init_optimizer(model: TrainableModel, steps: int, params: Arrays) -> optax.OptState:
    """Returns the optimizer's initial state, each moment sharded like its parameter."""
    init = make_optimizer(model.train, steps).init
    return jax.jit(init, out_shardings=_optimizer_shardings(model, steps))(params)


def _optimizer_shardings(model: TrainableModel, steps: int) -> optax.OptState:
    def sharding_of(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return model.shardings[names[-1]] if names else model.layout.replicated()

    return jax.tree_util.tree_map_with_path(sharding_of, _abstract_optimizer(model, steps))


def _abstract_optimizer(model: TrainableModel, steps: int) -> optax.OptState:
    return jax.eval_shape(make_optimizer(model.train, steps).init, named_arrays(model.trained))


def abstract_arguments(model: TrainableModel, steps: int, parts: int, rows: int, tokens: int) -> tuple:
    """Returns the arguments of `make_train_step`'s function for a batch of this shape, as shapes with shardings."""

    def like(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    layout, shardings = model.layout, model.shardings
    params = {name: like(leaf, shardings[name]) for name, leaf in named_arrays(model.trained).items()}
    state = jax.tree.map(like, _abstract_optimizer(model, steps), _optimizer_shardings(model, steps))
    kept = stored_shardings(model.frozen, layout)
    frozen = nnx.from_flat_state(
        [(p, v.replace(like(v.get_value(), kept[p]))) for p, v in nnx.to_flat_state(model.frozen)]
    )
    ids, labels, metadata = (
        cast(Any, jax.ShapeDtypeStruct)((parts, rows, width), dtype, sharding=layout.accumulated(3))
        for width, dtype in ((tokens, jnp.int32), (len(RANKS), jnp.int32), (3, jnp.float32))
    )
    step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=layout.replicated())
    return params, state, frozen, step, MicroBatches(ids, labels, metadata)


def microbatch_shape(rows: int, width: int, devices: int, tokens_per_device: int) -> tuple[int, int]:
    """Returns the least number of micro-batches within the token budget, and the rows of each, a multiple of devices."""
    most = max(1, tokens_per_device // width) * devices
    parts = -(-rows // most)
    return parts, -(-rows // (parts * devices)) * devices


def place(batch: ExampleBatch, layout: Layout, tokens_per_device: int, *, pad: int) -> MicroBatches:
    """Puts a batch on the devices as micro-batches; added filler rows hold CLS alone."""
    rows, width = batch.ids.shape
    parts, size = microbatch_shape(rows, width, layout.data_devices, tokens_per_device)

    def put(array: np.ndarray, fill: np.ndarray | float | int) -> Array:
        filled = np.empty((parts * size, array.shape[1]), array.dtype)
        filled[:rows], filled[rows:] = array, fill
        filled = filled.reshape(parts, size, array.shape[1])
        return jax.make_array_from_callback(filled.shape, layout.accumulated(3), lambda index: filled[index])

    cls_alone = np.where(np.arange(width) == 0, batch.ids[0, 0], pad)
    return MicroBatches(put(batch.ids, cls_alone), put(batch.labels, -1), put(batch.metadata, np.nan))


def make_train_step(
    model: TrainableModel, steps: int
) -> Callable[[Arrays, optax.OptState, nnx.State, Array, MicroBatches], tuple[Arrays, optax.OptState, StepMetrics]]:
    """Returns the jitted step, a function of params, optimizer state, frozen parameters, step number and batch.

    The first two arguments are donated. The loss does not depend on how a batch is divided: denominators are those of
    the whole batch, and a row's randomness depends on the seed, the step and the row's position in the batch. The
    contrastive loss needs all vectors of the batch: if that is divided, they are computed twice, first without the
    gradient (Gao, Zhang, Han, Callan 2021, arXiv:2101.06983).

    Args:
        model: Its arrays may be abstract; then the step can only be lowered.
        steps: Steps of the whole training, for the learning rate.
    """
    layout, loss, seed = model.layout, model.loss, model.train.seed
    optimizer, rate = make_optimizer(model.train, steps), learning_rate(model.train, steps)

    def part_loss(
        params: Arrays,
        frozen: nnx.State,
        counts: Array,
        part: MicroBatches,
        inputs: Array,
        selected: Array,
        keys: Array,
    ) -> tuple[tuple[Float[Array, ""], Float[Array, "b d"]], Float[Array, "7"]]:
        classifier = model.merge(params, frozen)
        remat = model.train.remat == "layer"
        pooled, hidden = classifier.vectors(inputs, layout, keys=keys, remat=remat)
        if model.train.objective == "mlm":
            total = masked_lm_loss(classifier.trunk.logits(hidden), part.ids, selected, counts[0])
            return (total, pooled), jnp.zeros(len(RANKS), jnp.float32)
        ranks, total = _taxonomic(classifier, pooled, part, counts, loss, layout)
        return (total, pooled), ranks[0]

    def contrast(pooled: Float[Array, "*parts d"], labels: Int32[Array, "*parts 7"]) -> tuple[Array, Array]:
        """Returns the contrastive loss of a whole batch and the weighted gradient by its vectors."""
        if not loss.contrastive:
            return jnp.float32(0.0), jnp.zeros_like(pooled)
        rows, taxa = (
            jax.lax.with_sharding_constraint(x.reshape(-1, x.shape[-1]), layout.replicated()) for x in (pooled, labels)
        )
        value, pull = jax.value_and_grad(contrastive_loss)(rows, taxa, loss.scale, loss.contrastive_weights)
        return value, loss.contrastive * pull.reshape(pooled.shape)

    def train_step(
        params: Arrays, state: optax.OptState, frozen: nnx.State, step: Array, batch: MicroBatches
    ) -> tuple[Arrays, optax.OptState, StepMetrics]:
        keys, masking = _row_keys(seed, step, batch.ids.shape[:2])
        inputs, selected = batch.ids, jnp.zeros(batch.ids.shape, bool)
        if model.train.objective == "mlm":
            inputs, selected = jax.vmap(lambda k, ids: _mask(model, k, ids))(masking, batch.ids)
            counts = jnp.zeros(len(RANKS)).at[0].set(jnp.sum(selected, dtype=jnp.float32))
        else:
            counts = known_rows(batch.labels.reshape(-1, len(RANKS)))

        def gradient_of(part: tuple, pull: Array | None) -> tuple[tuple, Array]:
            """Returns sums over a part, and its vectors; without `pull` it is the whole batch."""
            (value, pooled), back, ranks = jax.vjp(
                lambda params: part_loss(params, frozen, counts, *part), params, has_aux=True
            )
            apart = jnp.float32(0.0)
            if pull is None:
                apart, pull = contrast(pooled, part[0].labels)
            return (value, ranks, back((jnp.ones_like(value), pull))[0], apart), pooled

        parts = batch, inputs, selected, keys
        if batch.ids.shape[0] == 1:
            (value, ranks, gradient, apart), pooled = gradient_of(jax.tree.map(lambda x: x[0], parts), None)
        else:
            pulls = jnp.zeros((*batch.ids.shape[:2], model.transformer.hidden_size), jnp.float32)
            apart = jnp.float32(0.0)
            if loss.contrastive:
                vectors_of = lambda part: part_loss(params, frozen, counts, *part)[0][1]  # noqa: E731
                apart, pulls = contrast(jax.lax.map(vectors_of, parts), batch.labels)

            def accumulate(total: tuple, part: tuple) -> tuple[tuple, Array]:
                found, pooled = gradient_of(*part)
                return jax.tree.map(jnp.add, total, found), pooled

            zero = (jnp.float32(0.0), jnp.zeros(len(RANKS), jnp.float32), jax.tree.map(jnp.zeros_like, params), apart)
            (value, ranks, gradient, apart), pooled = jax.lax.scan(accumulate, zero, (parts, pulls))
        value = value + loss.contrastive * apart
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(gradient, state, params)
        changed = optax.apply_updates(params, updates), new_state
        params, state = jax.tree.map(partial(jnp.where, finite), changed, (params, state))
        used = jnp.sum(batch.ids != model.transformer.pad_token_id, axis=2).reshape(-1) > 1
        moments = embedding_moments(pooled.reshape(-1, pooled.shape[-1]), used)
        return params, state, StepMetrics(value, ranks, counts, apart, norm, jnp.float32(rate(step)), finite, moments)

    return jax.jit(train_step, donate_argnums=(0, 1))


class Evaluation:
    """Computes the metrics of validation rows; compiled once for each shape of batch."""

    def __init__(self, model: TrainableModel, taxa: tuple[int, ...]):
        """Takes the model and the number of taxa at each rank."""
        self._model, self._taxa = model, taxa
        self._evaluate = _make_evaluation(model)

    def __call__(
        self, params: Arrays, frozen: nnx.State, batches: Iterable[ExampleBatch], stop: StopRequest
    ) -> dict[str, float] | None:
        """Returns metrics by dashboard name, including `eval/loss`; None if a stop was requested."""
        model, loss = self._model, self._model.loss
        counts = no_counts(self._taxa)
        sums, known = np.zeros((1, len(RANKS))), np.zeros(len(RANKS))

        def start() -> Iterator[tuple[ExampleBatch, EvaluationSums]]:
            for number, batch in enumerate(batches):
                placed = place(batch, model.layout, _ONE_PART, pad=model.transformer.pad_token_id)
                yield batch, self._evaluate(params, frozen, jnp.uint32(number), placed)

        for batch, result in _one_behind(start()):
            found = jax.device_get(result)
            sums = sums + found.loss_sums.astype(np.float64)
            known += found.counts
            if model.train.objective == "taxonomy":
                counts = add_predictions(counts, found.predicted[: len(batch.labels)], batch.labels)
            if any_process(bool(stop))[0]:
                return None
        means = sums / np.maximum(known, 1.0)
        if model.train.objective == "mlm":
            return {"eval/loss": float(means[0, 0])}
        weighted = (means * np.array(loss.rank_weights)).sum(axis=1)
        share = loss.metadata_share
        total = weighted[0] if len(weighted) == 1 else (1.0 - share) * weighted[0] + share * weighted[1]
        metrics = {"eval/loss": float(total)}
        metrics |= {f"eval/loss/{rank}": float(means[0, r]) for r, rank in enumerate(RANKS) if known[r]}
        return metrics | dashboard_metrics(counts)


def _one_behind(started: Iterator[_T]) -> Iterator[_T]:
    """Yields each item after the next was made: the devices have work while the host reads results."""
    for last in started:
        for item in started:
            yield last
            last = item
        yield last


def _make_evaluation(model: TrainableModel) -> Callable[[Arrays, nnx.State, Array, MicroBatches], EvaluationSums]:
    """Returns the jitted evaluation of one undivided batch: params, frozen parameters, batch number, batch."""
    layout, loss = model.layout, model.loss

    def evaluate(params: Arrays, frozen: nnx.State, number: Array, batch: MicroBatches) -> EvaluationSums:
        part = jax.tree.map(lambda x: x[0], batch)
        classifier = model.merge(params, frozen)
        if model.train.objective == "mlm":
            _, masking = _row_keys(model.train.seed, number, part.ids.shape[:1])
            inputs, selected = _mask(model, masking, part.ids)
            _, hidden = classifier.vectors(inputs, layout)
            summed = masked_lm_loss(classifier.trunk.logits(hidden), part.ids, selected, jnp.float32(1.0))
            sums = jnp.zeros((1, len(RANKS))).at[0, 0].set(summed)
            counts = jnp.zeros(len(RANKS)).at[0].set(jnp.sum(selected, dtype=jnp.float32))
            predicted = jnp.full((part.ids.shape[0], len(RANKS)), -1, jnp.int32)
            return EvaluationSums(sums, counts, predicted)
        pooled, _ = classifier.vectors(part.ids, layout)
        assert classifier.head is not None
        assert model.tree is not None
        sums, _ = _taxonomic(classifier, pooled, part, jnp.ones(len(RANKS)), loss, layout)
        predicted, _ = predict(classifier.head(pooled, layout), model.tree, loss.head)
        return EvaluationSums(sums, known_rows(part.labels), predicted)

    return jax.jit(evaluate, out_shardings=layout.replicated())


def _taxonomic(
    classifier: Classifier, pooled: Array, part: MicroBatches, counts: Array, loss: config.LossConfig, layout: Layout
) -> tuple[Float32[Array, "kinds 7"], Float32[Array, ""]]:
    """Returns the losses at each rank, of the sequences and of the metadata if configured, and the total."""
    assert classifier.head is not None
    labels = part.labels
    ranks = rank_losses(classifier.head.of_labels(pooled, labels, layout), labels, counts)
    total = total_loss(ranks, loss.rank_weights)
    if classifier.encoder is None:
        return ranks[None], total
    other = rank_losses(classifier.encoder.of_labels(part.metadata, labels, layout), labels, counts)
    return jnp.stack([ranks, other]), combine(total, total_loss(other, loss.rank_weights), loss.metadata_share)


def _row_keys(seed: int, number: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns dropout and masking keys for each row of a batch, which depend on its position alone."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    rows = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    dropout, masking = (jnp.vectorize(partial(jax.random.fold_in, k))(rows) for k in jax.random.split(key))
    return dropout, masking


def _mask(
    model: TrainableModel, keys: Array, ids: Int32[Array, "b s"]
) -> tuple[Int32[Array, "b s"], Bool[Array, "b s"]]:
    hide = partial(
        mask_tokens,
        mask_id=model.transformer.mask_token_id,
        special_ids=model.special_ids,
        vocab_size=model.transformer.vocab_size,
        rate=model.loss.mask_rate,
    )
    inputs, selected = jax.vmap(lambda key, row: hide(key, row[None]))(keys, ids)
    return inputs[:, 0], selected[:, 0]
