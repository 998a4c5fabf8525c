"""One pass over validation rows: losses, and accuracy at each rank."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.hosts import agree
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.model.classifier import Arrays
from bioscan_jax.training.batches import ExampleBatch
from bioscan_jax.training.metrics import add_predictions, no_counts, report
from bioscan_jax.training.step import Learner, make_evaluation, place

_WHOLE = 1 << 62
"""Tokens of a batch that is never worked in parts."""


class Evaluation:
    """A jitted evaluation and the batches it goes over."""

    def __init__(self, learner: Learner, sizes: tuple[int, ...]):
        self._learner, self._sizes = learner, sizes
        self._evaluate = make_evaluation(learner)

    def __call__(
        self, params: Arrays, frozen: nnx.State, batches: Iterable[ExampleBatch], stop: StopRequest
    ) -> dict[str, float] | None:
        """Numbers under their dashboard names, with `eval/loss`; None if a stop was asked for."""
        learner, loss = self._learner, self._learner.loss
        counts = no_counts(self._sizes)
        sums, known = np.zeros((1, len(RANKS))), np.zeros(len(RANKS))
        for number, batch in enumerate(batches):
            placed = place(batch, learner.layout, _WHOLE, pad=learner.transformer.pad_token_id)
            found = jax.device_get(self._evaluate(params, frozen, jnp.uint32(number), placed))
            sums = sums + found.loss_sums.astype(np.float64)
            known += found.counts
            if learner.train.objective == "taxonomy":
                counts = add_predictions(counts, found.predicted[: len(batch.labels)], batch.labels)
            if agree(bool(stop))[0]:
                return None
        means = sums / np.maximum(known, 1.0)
        if learner.train.objective == "mlm":
            return {"eval/loss": float(means[0, 0])}
        weighted = (means * np.array(loss.rank_weights)).sum(axis=1)
        share = loss.metadata_share
        total = weighted[0] if len(weighted) == 1 else (1.0 - share) * weighted[0] + share * weighted[1]
        numbers = {"eval/loss": float(total)}
        numbers |= {f"eval/loss/{rank}": float(means[0, r]) for r, rank in enumerate(RANKS) if known[r]}
        return numbers | report(counts)
