"""One optimizer step and one evaluation, as jitted functions over sharded arrays.

Trainable parameters, their gradients and the optimizer's moments are float32 and apart from the frozen ones, so that
only they are differentiated and summed over the devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.model.classifier import Arrays, Classifier, filled, flat, is_new
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.heads import predict
from bioscan_jax.model.tree import TaxonTree
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.losses import combine, known_rows, mask_tokens, masked_lm_loss, rank_losses, total_loss
from bioscan_jax.training.metrics import EmbeddingMoments, embedding_moments


class Parts(NamedTuple):
    """A batch in equal parts that are worked one after another, each split over the devices."""

    ids: Int32[Array, "parts b s"]
    labels: Int32[Array, "parts b 7"]
    metadata: Float32[Array, "parts b 3"]


class Numbers(NamedTuple):
    """What a step tells; float32, the same on every device."""

    loss: Float32[Array, ""]
    ranks: Float32[Array, "7"]
    """Mean loss of the sequences at each rank; 0 where no row is known, and for mlm."""
    known: Float32[Array, "7"]
    """Rows known at each rank."""
    gradient_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]
    good: Bool[Array, ""]
    """Whether loss and gradient were finite; if not, nothing was changed."""
    moments: EmbeddingMoments


class Evaluated(NamedTuple):
    """One evaluated batch."""

    loss_sums: Float32[Array, "kinds 7"]
    """Summed losses at each rank of the sequences, and of the metadata; for mlm the first number is all."""
    counts: Float32[Array, "7"]
    """Rows known at each rank; for mlm the first number is the tokens predicted."""
    predicted: Int32[Array, "b 7"]
    """Taxa; -1 for mlm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A classifier taken apart: what is trained, and the rest."""

    graph: nnx.GraphDef
    trainable: nnx.State
    """The trained parameters; the step uses their places and kinds, not their values."""
    frozen: nnx.State
    layout: Layout
    loss: config.LossConfig
    train: config.TrainConfig
    transformer: TransformerConfig
    tree: TaxonTree | None
    special_ids: tuple[int, ...]
    """Never masked by mlm."""

    @property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """Where the trained parameters live."""
        found = stored_shardings(self.trainable, self.layout)
        return {".".join(map(str, path)): sharding for path, sharding in found.items()}

    def classifier(self, params: Arrays, frozen: nnx.State) -> Classifier:
        """The whole again."""
        return nnx.merge(self.graph, filled(self.trainable, params), frozen)


def take_apart(
    classifier: Classifier,
    layout: Layout,
    loss: config.LossConfig,
    train: config.TrainConfig,
    *,
    tree: TaxonTree | None,
    special_ids: tuple[int, ...],
) -> Learner:
    """Parts a classifier by what `train.mode` trains; its arrays may be abstract."""
    trained = is_new if train.mode == "lora" else nnx.Param
    graph, trainable, frozen = nnx.split(classifier, trained, ...)
    return Learner(
        graph=graph,
        trainable=trainable,
        frozen=frozen,
        layout=layout,
        loss=loss,
        train=train,
        transformer=classifier.trunk.config,
        tree=tree,
        special_ids=special_ids,
    )


def learning_rate(train: config.TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up (over at most half of all steps), then a cosine down to 0."""
    warmup = min(train.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, warmup, steps)


def make_optimizer(train: config.TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the norm; no weight decay on biases and norms."""

    def decayed(params: Arrays) -> dict[str, bool]:
        return {name: name.rpartition(".")[2] not in ("bias", "scale") for name in params}

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(learning_rate(train, steps), weight_decay=train.weight_decay, mask=decayed),
    )


def init_optimizer(learner: Learner, steps: int, params: Arrays) -> optax.OptState:
    """The optimizer's state before the first step, its moments beside their parameters."""
    init = make_optimizer(learner.train, steps).init
    return jax.jit(init, out_shardings=_optimizer_shardings(learner, steps))(params)


def _optimizer_shardings(learner: Learner, steps: int) -> optax.OptState:
    def beside(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return learner.shardings[names[-1]] if names else learner.layout.replicated()

    return jax.tree_util.tree_map_with_path(beside, _abstract_optimizer(learner, steps))


def _abstract_optimizer(learner: Learner, steps: int) -> optax.OptState:
    return jax.eval_shape(make_optimizer(learner.train, steps).init, flat(learner.trainable))


def abstract_arguments(learner: Learner, steps: int, parts: int, rows: int, tokens: int) -> tuple:
    """What `make_train_step`'s function takes for a batch of this shape, as shapes with shardings."""

    def like(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    layout, shardings = learner.layout, learner.shardings
    params = {name: like(leaf, shardings[name]) for name, leaf in flat(learner.trainable).items()}
    state = jax.tree.map(like, _abstract_optimizer(learner, steps), _optimizer_shardings(learner, steps))
    kept = stored_shardings(learner.frozen, layout)
    frozen = nnx.from_flat_state(
        [(p, v.replace(like(v.get_value(), kept[p]))) for p, v in nnx.to_flat_state(learner.frozen)]
    )
    ids, labels, metadata = (
        cast(Any, jax.ShapeDtypeStruct)((parts, rows, width), dtype, sharding=layout.accumulated(3))
        for width, dtype in ((tokens, jnp.int32), (len(RANKS), jnp.int32), (3, jnp.float32))
    )
    step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=layout.replicated())
    return params, state, frozen, step, Parts(ids, labels, metadata)


def parts_of(rows: int, width: int, devices: int, tokens_per_device: int) -> tuple[int, int]:
    """How a batch is worked: the fewest equal parts within the budget, and the rows of each, a multiple of devices."""
    most = max(1, tokens_per_device // width) * devices
    parts = -(-rows // most)
    return parts, -(-rows // (parts * devices)) * devices


def place(batch: ExampleBatch, layout: Layout, tokens_per_device: int, *, pad: int) -> Parts:
    """Puts a batch on the devices, filled up with rows of CLS alone."""
    rows, width = batch.ids.shape
    parts, size = parts_of(rows, width, layout.data_devices, tokens_per_device)

    def put(array: np.ndarray, fill: np.ndarray | float | int) -> Array:
        whole = np.empty((parts * size, array.shape[1]), array.dtype)
        whole[:rows], whole[rows:] = array, fill
        whole = whole.reshape(parts, size, array.shape[1])
        return jax.make_array_from_callback(whole.shape, layout.accumulated(3), lambda index: whole[index])

    alone = np.where(np.arange(width) == 0, batch.ids[0, 0], pad)
    return Parts(put(batch.ids, alone), put(batch.labels, -1), put(batch.metadata, np.nan))


def make_train_step(
    learner: Learner, steps: int
) -> Callable[[Arrays, optax.OptState, nnx.State, Array, Parts], tuple[Arrays, optax.OptState, Numbers]]:
    """The jitted step: params, optimizer state, frozen parameters, number of the step, batch.

    The first two are given up to it. The loss of a batch does not depend on its parts: denominators are the whole
    batch's, and what is random for a row depends on the seed, the step and its place in the batch.

    Args:
        learner: Its arrays may be abstract; then only lowering works.
        steps: Of the whole training, for the learning rate.
    """
    layout, loss, seed = learner.layout, learner.loss, learner.train.seed
    optimizer, rate = make_optimizer(learner.train, steps), learning_rate(learner.train, steps)

    def part_loss(
        params: Arrays, frozen: nnx.State, part: Parts, inputs: Array, selected: Array, keys: Array, counts: Array
    ) -> tuple[Float[Array, ""], tuple[Float[Array, "7"], Float[Array, "b d"]]]:
        classifier = learner.classifier(params, frozen)
        remat = learner.train.remat == "layer"
        pooled, hidden = classifier.vectors(inputs, layout, keys=keys, remat=remat)
        if learner.train.objective == "mlm":
            total = masked_lm_loss(classifier.trunk.logits(hidden), part.ids, selected, counts[0])
            return total, (jnp.zeros(len(RANKS), jnp.float32), pooled)
        ranks, total = _taxonomic(classifier, pooled, part, counts, loss, layout)
        return total, (ranks[0], pooled)

    def train_step(
        params: Arrays, state: optax.OptState, frozen: nnx.State, step: Array, batch: Parts
    ) -> tuple[Arrays, optax.OptState, Numbers]:
        keys, masking = _row_keys(seed, step, batch.ids.shape[:2])
        inputs, selected = batch.ids, jnp.zeros(batch.ids.shape, bool)
        if learner.train.objective == "mlm":
            inputs, selected = jax.vmap(lambda k, ids: _mask(learner, k, ids))(masking, batch.ids)
            counts = jnp.zeros(len(RANKS)).at[0].set(jnp.sum(selected, dtype=jnp.float32))
        else:
            counts = known_rows(batch.labels.reshape(-1, len(RANKS)))
        gradient_of = jax.value_and_grad(part_loss, has_aux=True)

        def work(total: tuple, part: tuple) -> tuple[tuple, Array]:
            (value, (ranks, pooled)), gradient = gradient_of(params, frozen, *part, counts)
            return jax.tree.map(jnp.add, total, (value, ranks, gradient)), pooled

        zero = (jnp.float32(0.0), jnp.zeros(len(RANKS), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        parts = batch, inputs, selected, keys
        if batch.ids.shape[0] == 1:
            (value, ranks, gradient), pooled = work(zero, jax.tree.map(lambda x: x[0], parts))
        else:
            (value, ranks, gradient), pooled = jax.lax.scan(work, zero, parts)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, moved = optimizer.update(gradient, state, params)
        changed = optax.apply_updates(params, updates), moved
        params, state = jax.tree.map(partial(jnp.where, good), changed, (params, state))
        used = jnp.sum(batch.ids != learner.transformer.pad_token_id, axis=2).reshape(-1) > 1
        moments = embedding_moments(pooled.reshape(-1, pooled.shape[-1]), used)
        return params, state, Numbers(value, ranks, counts, norm, jnp.float32(rate(step)), good, moments)

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_evaluation(learner: Learner) -> Callable[[Arrays, nnx.State, Array, Parts], Evaluated]:
    """The jitted evaluation of one batch in one part: params, frozen parameters, number of the batch, batch."""
    layout, loss = learner.layout, learner.loss

    def evaluate(params: Arrays, frozen: nnx.State, number: Array, batch: Parts) -> Evaluated:
        part = jax.tree.map(lambda x: x[0], batch)
        classifier = learner.classifier(params, frozen)
        if learner.train.objective == "mlm":
            _, masking = _row_keys(learner.train.seed, number, part.ids.shape[:1])
            inputs, selected = _mask(learner, masking, part.ids)
            _, hidden = classifier.vectors(inputs, layout)
            summed = masked_lm_loss(classifier.trunk.logits(hidden), part.ids, selected, jnp.float32(1.0))
            sums = jnp.zeros((1, len(RANKS))).at[0, 0].set(summed)
            counts = jnp.zeros(len(RANKS)).at[0].set(jnp.sum(selected, dtype=jnp.float32))
            predicted = jnp.full((part.ids.shape[0], len(RANKS)), -1, jnp.int32)
            return Evaluated(sums, counts, predicted)
        pooled, _ = classifier.vectors(part.ids, layout)
        assert classifier.head is not None
        assert learner.tree is not None
        sums, _ = _taxonomic(classifier, pooled, part, jnp.ones(len(RANKS)), loss, layout)
        predicted, _ = predict(classifier.head(pooled, layout), learner.tree, loss.head)
        return Evaluated(sums, known_rows(part.labels), predicted)

    return jax.jit(evaluate, out_shardings=layout.replicated())


def _taxonomic(
    classifier: Classifier, pooled: Array, part: Parts, counts: Array, loss: config.LossConfig, layout: Layout
) -> tuple[Float32[Array, "kinds 7"], Float32[Array, ""]]:
    """Losses at each rank, of the sequences and of the metadata if asked for, and the total."""
    assert classifier.head is not None
    ranks = rank_losses(classifier.head(pooled, layout), part.labels, counts)
    total = total_loss(ranks, loss.rank_weights)
    if classifier.encoder is None:
        return ranks[None], total
    other = rank_losses(classifier.encoder(part.metadata, layout), part.labels, counts)
    return jnp.stack([ranks, other]), combine(total, total_loss(other, loss.rank_weights), loss.metadata_share)


def _row_keys(seed: int, number: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Keys for each row of a batch, by its place alone: of dropout, and of masking."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    rows = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    dropout, masking = (jnp.vectorize(partial(jax.random.fold_in, k))(rows) for k in jax.random.split(key))
    return dropout, masking


def _mask(learner: Learner, keys: Array, ids: Int32[Array, "b s"]) -> tuple[Int32[Array, "b s"], Bool[Array, "b s"]]:
    hide = partial(
        mask_tokens,
        mask_id=learner.transformer.mask_token_id,
        special_ids=learner.special_ids,
        vocab_size=learner.transformer.vocab_size,
        rate=learner.loss.mask_rate,
    )
    inputs, selected = jax.vmap(lambda key, row: hide(key, row[None]))(keys, ids)
    return inputs[:, 0], selected[:, 0]
