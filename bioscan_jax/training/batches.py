"""Training batches: any one of them from its number alone, so that a run resumes exactly and grain reads ahead.

Batch number n depends on the rows, the seed and n: not on the devices, nor on what was read before.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int, Int32, Int64

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import reverse_complement
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.barcodes.views import cut_views
from bioscan_jax.data.batching import WIDTH_STEP, BatchShape, choose_widths, make_batches, pad_rows
from bioscan_jax.training.examples import Examples

_SORTED_BATCHES = 64
"""Batches whose rows are sorted by length together; enough to fill widths, few enough to stay random."""
_EVALUATED_ROWS = 4096
"""Rows made ready together."""
_ORDER, _AUGMENT = 0, 1
"""What a generator is for, in its seed."""


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """One optimizer step's rows; those past the end of an epoch are filler: CLS alone, nothing known."""

    rows: Int64[np.ndarray, " b"]
    """Rows of the input, -1 for filler."""
    ids: Int32[np.ndarray, "b tokens"]
    labels: Int32[np.ndarray, "b 7"]
    """-1 is unknown; all of it for an objective without labels."""
    metadata: Float32[np.ndarray, "b 3"]
    """NaN is missing; all of it where there is none."""


def epoch_order(
    rows: Int64[np.ndarray, " rows"],
    tokens: Int[np.ndarray, " rows"],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    probability: Float64[np.ndarray, " rows"] | None = None,
) -> Int64[np.ndarray, "steps batch"]:
    """The rows of each batch of an epoch, those of one batch of similar length; -1 fills up the last one.

    Args:
        rows: Each comes once, in random order.
        tokens: Length of each of them.
        batch_size: Rows of a batch.
        seed: Of the run.
        epoch: Counted from 0.
        probability: If given, as many rows are drawn with replacement, each by its probability.
    """
    random = np.random.default_rng((seed, _ORDER, epoch))
    drawn = probability is not None
    order = random.choice(len(rows), len(rows), p=probability) if drawn else random.permutation(len(rows))
    group = _SORTED_BATCHES * batch_size
    pieces = [order[first : first + group] for first in range(0, len(order), group)]
    order = np.concatenate([piece[np.argsort(tokens[piece], kind="stable")] for piece in pieces])
    steps = -(-len(order) // batch_size)
    batches = np.full((steps, batch_size), -1, np.int64)
    batches.reshape(-1)[: len(order)] = rows[order]
    return batches[random.permutation(steps)]


def balanced(labels: Int32[np.ndarray, "rows 7"], rank: str) -> Float64[np.ndarray, " rows"]:
    """Probabilities with which every taxon of a rank is drawn equally often.

    A row that is unknown at the rank counts to its finest known taxon above.
    """
    upto = labels[:, : RANKS.index(rank) + 1]
    _, taxon_of, rows = np.unique(upto, axis=0, return_inverse=True, return_counts=True)
    return 1.0 / (len(rows) * rows[taxon_of.reshape(-1)])


def augment(
    sequences: list[bytes], random: np.random.Generator, *, reverse: float, cut: float, shortest: int
) -> list[bytes]:
    """Turns some sequences to the other strand and cuts some to a random stretch.

    A stretch's length is uniform from `shortest` to the whole, and so is its place; sequences without A, C, G, T in
    the stretch stay whole.

    Args:
        sequences: Cleaned bases.
        random: Draws four numbers a sequence, whatever they decide.
        reverse: Probability of the other strand.
        cut: Probability of a cut.
        shortest: Bases of a stretch at least.
    """
    draws = random.random((len(sequences), 4))
    changed = []
    for bases, (turn, keep, size, place) in zip(sequences, draws.tolist(), strict=True):
        if keep < cut and len(bases) > shortest:
            length = shortest + int(size * (len(bases) - shortest + 1))
            first = int(place * (len(bases) - length + 1))
            stretch = bases[first : first + length]
            bases = stretch if stretch.strip(b"N") else bases
        changed.append((turn < reverse, bases))
    turned = iter(reverse_complement(_strings([bases for turn, bases in changed if turn])).to_pylist())
    return [next(turned).encode() if turn else bases for turn, bases in changed]


class TrainingBatches:
    """A grain RandomAccessDataSource: element n is the batch of optimizer step n, counted over all epochs."""

    def __init__(self, examples: Examples, train: config.TrainConfig, vocabulary: Vocabulary, max_tokens: int):
        self._examples, self._train, self._vocabulary = examples, train, vocabulary
        self.rows = examples.rows("train")
        self._tokens = np.minimum(examples.tokens[self.rows], max_tokens)
        longest = min(max_tokens, -(-int(self._tokens.max()) // WIDTH_STEP) * WIDTH_STEP)
        self.widths = choose_widths(self._tokens, longest, train.max_shapes)
        self.steps_per_epoch = -(-len(self.rows) // train.batch_size)
        self._probability = None
        if train.balance != "none" and examples.labels is not None:
            self._probability = balanced(examples.labels[self.rows], train.balance)
        self._lock: threading.Lock = threading.Lock()
        self._orders: dict[int, Int64[np.ndarray, "steps batch"]] = {}

    def __repr__(self) -> str:
        return f"TrainingBatches(rows={len(self.rows)}, batch_size={self._train.batch_size})"

    def __len__(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self._train.epochs

    def __getitem__(self, step: int) -> ExampleBatch:
        """Makes a batch: its rows, augmented, as tokens of the least width that holds them."""
        epoch, number = divmod(int(step), self.steps_per_epoch)
        rows = self._order_of(epoch)[number]
        used = rows[rows >= 0]
        random = np.random.default_rng((self._train.seed, _AUGMENT, int(step)))
        sequences = augment(
            self._examples.sequences(used),
            random,
            reverse=self._train.reverse_complement,
            cut=self._train.subsequence,
            shortest=self._train.shortest,
        )
        tokens = encode(_strings(sequences), self._vocabulary)
        # A cut can leave Ns where they cost more tokens than the whole sequence: then the last width cuts once more.
        fitting = int(np.searchsorted(self.widths, min(int(tokens.lengths.max()), self.widths[-1])))
        vocabulary, width = self._vocabulary, self.widths[fitting]
        ids = pad_rows(tokens, np.arange(len(used)), len(rows), width, cls=vocabulary.cls_id, pad=vocabulary.pad_id)
        return _with_labels(self._examples, used, ids)

    def _order_of(self, epoch: int) -> Int64[np.ndarray, "steps batch"]:
        with self._lock:
            if epoch not in self._orders:
                # Readers are in two epochs at once where one ends.
                self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = epoch_order(
                    self.rows,
                    self._tokens,
                    batch_size=self._train.batch_size,
                    seed=self._train.seed,
                    epoch=epoch,
                    probability=self._probability,
                )
            return self._orders[epoch]


def evaluation_batches(
    examples: Examples, rows: Int64[np.ndarray, " rows"], shapes: Sequence[BatchShape], vocabulary: Vocabulary
) -> Iterator[ExampleBatch]:
    """Whole sequences of some rows, each once, cut at the last width; a batch's last rows may be filler."""
    order = rows[np.argsort(examples.tokens[rows], kind="stable")]
    for first in range(0, len(order), _EVALUATED_ROWS):
        chunk = order[first : first + _EVALUATED_ROWS]
        strings = _strings(examples.sequences(chunk))
        views = cut_views(
            strings, vocabulary, max_tokens=shapes[-1].tokens, overlong="truncate", strand="forward", phases=1
        )
        for batch in make_batches(views.tokens, shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id):
            yield _with_labels(examples, chunk[batch.rows], batch.ids)


def _with_labels(
    examples: Examples, used: Int64[np.ndarray, " used"], ids: Int32[np.ndarray, "b tokens"]
) -> ExampleBatch:
    size = len(ids)
    rows = np.full(size, -1, np.int64)
    labels = np.full((size, len(RANKS)), -1, np.int32)
    metadata = np.full((size, 3), np.nan, np.float32)
    rows[: len(used)] = used
    if examples.labels is not None:
        labels[: len(used)] = examples.labels[used]
    if examples.metadata is not None:
        metadata[: len(used)] = examples.metadata[used]
    return ExampleBatch(rows, ids, labels, metadata)


def _strings(sequences: list[bytes]) -> pa.LargeStringArray:
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(bases) for bases in sequences], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(sequences), pa.py_buffer(offsets), pa.py_buffer(b"".join(sequences)))
