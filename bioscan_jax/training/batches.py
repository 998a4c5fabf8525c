"""Training batches, each computed from its step number alone, so that grain prefetches them and resumes exactly.

Batch n depends on the rows, the seed and n, but not on the devices or on the batches read before. Each of several
processes makes the whole batch, of which its devices take their rows: 1,024 COI barcodes take 4 ms of one core, 20 ms with
substitutions, and so the random numbers are those of one process.

grain iterates, prefetches in threads and holds the state of the iterator. The order of rows stays by hand: grain's own
shuffle and batch know neither batches of similar length nor sampling by probability, and would change earlier runs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import grain

_SORTED_BATCHES = 64
"""Number of batches whose rows are sorted by length together: enough to fill widths, few enough to stay random."""
_EVALUATED_ROWS = 4096
"""Validation rows that are tokenized together."""
_ORDER, _AUGMENT = 0, 1
"""Part of a random generator's seed that tells its purpose."""
_KMER = 6
_BASES = np.frombuffer(b"ACGT", np.uint8)
_CODES = np.full(256, len(_BASES), np.uint8)
_CODES[_BASES] = np.arange(len(_BASES))
_READERS = 2
"""Threads that prepare batches."""


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """The rows of one optimizer step, with filler rows (CLS alone, no labels) past the end of an epoch."""

    rows: Int64[np.ndarray, " b"]
    """Row numbers in the input, -1 for filler."""
    ids: Int32[np.ndarray, "b tokens"]
    labels: Int32[np.ndarray, "b 7"]
    """-1 where unknown, and everywhere for an objective without labels."""
    metadata: Float32[np.ndarray, "b 3"]
    """NaN where missing, and everywhere if the run uses no metadata."""


def epoch_order(
    rows: Int64[np.ndarray, " rows"],
    tokens: Int[np.ndarray, " rows"],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    probability: Float64[np.ndarray, " rows"] | None = None,
) -> Int64[np.ndarray, "steps batch"]:
    """Returns the rows of each batch of an epoch in random order, those of one batch of similar length.

    Args:
        rows: Row numbers; each occurs once, and -1 fills the last batch.
        tokens: Length of each row.
        batch_size: Rows per batch.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        probability: If given, as many rows are drawn with replacement, with these probabilities.
    """
    random = np.random.default_rng((seed, _ORDER, epoch))
    count = len(rows)
    order = random.permutation(count) if probability is None else random.choice(count, count, p=probability)
    group = _SORTED_BATCHES * batch_size
    pieces = [order[first : first + group] for first in range(0, len(order), group)]
    order = np.concatenate([piece[np.argsort(tokens[piece], kind="stable")] for piece in pieces])
    steps = -(-len(order) // batch_size)
    batches = np.full((steps, batch_size), -1, np.int64)
    batches.reshape(-1)[: len(order)] = rows[order]
    return batches[random.permutation(steps)]


def genus_order(
    rows: Int64[np.ndarray, " rows"],
    labels: Int32[np.ndarray, "rows 7"],
    *,
    batch_size: int,
    species: int,
    individuals: int,
    seed: int,
    epoch: int,
) -> Int64[np.ndarray, "steps batch"]:
    """Returns the rows of each batch of an epoch such that those of a genus and of a species come together.

    The rows of a species are cut into groups of `individuals`, in random order; the last group is filled with rows of
    the species that were already taken. `species` groups of one genus, of different species as far as it has them, are
    neighbours, in random order of the genera; two batches may share such neighbours. Each row occurs at least once, and
    the number of steps is the same in every epoch. Rows without a species or genus count as one species or genus for
    each finest known taxon.

    Args:
        rows: Row numbers; -1 fills the last batch.
        labels: Taxa of the rows; -1 is unknown.
        batch_size: Rows per batch, a multiple of `individuals`.
        species: Species of a genus that come together.
        individuals: Rows of a species that come together.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
    """
    random = np.random.default_rng((seed, _ORDER, epoch))
    paths, species_of = np.unique(labels, axis=0, return_inverse=True)
    species_of = species_of.reshape(-1)
    genus_of = np.unique(paths[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
    shuffled = np.lexsort((random.random(len(rows)), species_of))
    counts = np.bincount(species_of)
    slots = -(-counts // individuals) * individuals
    owner = np.repeat(np.arange(len(paths)), slots)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(slots) - slots, slots)
    groups = shuffled[np.repeat(np.cumsum(counts) - counts, slots) + position % counts[owner]].reshape(-1, individuals)
    owner, turn = owner[::individuals], position[::individuals]
    # Within a genus: the first group of each species, in random order; then the second group of each; and so on.
    order = np.lexsort((random.random(len(paths))[owner], turn, genus_of[owner]))
    genus = genus_of[owner[order]]
    place = np.arange(len(genus)) - np.searchsorted(genus, genus)
    neighbours = np.cumsum(place % species == 0) - 1
    order = order[np.argsort(random.permutation(neighbours[-1] + 1)[neighbours], kind="stable")]
    drawn = groups[order].reshape(-1)
    batches = np.full((-(-len(drawn) // batch_size), batch_size), -1, np.int64)
    batches.reshape(-1)[: len(drawn)] = rows[drawn]
    return batches


def sampler(
    rows: Int64[np.ndarray, " rows"],
    tokens: Int[np.ndarray, " rows"],
    labels: Int32[np.ndarray, "rows 7"] | None,
    train: config.TrainConfig,
) -> Callable[..., Int64[np.ndarray, "steps batch"]]:
    """Returns the function from `epoch`, counted from 0, to the rows of each of its batches, as the settings want them."""
    same = {"batch_size": train.batch_size, "seed": train.seed}
    if train.sampler == "genera" and labels is not None:
        together = {"species": train.species_per_genus, "individuals": train.rows_per_species}
        return partial(genus_order, rows, labels, **same, **together)
    probability = None
    if train.balance != "none" and labels is not None:
        probability = balanced_probabilities(labels, train.balance)
    return partial(epoch_order, rows, tokens, **same, probability=probability)


def balanced_probabilities(labels: Int32[np.ndarray, "rows 7"], rank: str) -> Float64[np.ndarray, " rows"]:
    """Returns sampling probabilities of the rows such that each taxon of a rank is drawn equally often.

    A row that is unknown at the rank counts towards its finest known taxon above it.
    """
    upto = labels[:, : RANKS.index(rank) + 1]
    _, taxon_of, rows = np.unique(upto, axis=0, return_inverse=True, return_counts=True)
    return 1.0 / (len(rows) * rows[taxon_of.reshape(-1)])


def augment(
    sequences: list[bytes],
    random: np.random.Generator,
    *,
    reverse: float,
    cut: float,
    shortest: int,
    shift: float = 0.0,
    substitutions: float = 0.0,
) -> list[bytes]:
    """Cuts some sequences to a random subsequence, reverse-complements some, and changes their start and some bases.

    The length of a subsequence is uniform from `shortest` to the whole, and so is its position. Nothing is cut off if
    no A, C, G or T would be left.

    Args:
        sequences: Cleaned bases.
        random: Generator; four numbers are drawn per sequence in any case, more for the last two changes.
        reverse: Probability of the reverse complement.
        cut: Probability of a cut.
        shortest: Least number of bases of a subsequence.
        shift: Probability that the first 0 to 5 bases, equally likely, are left out.
        substitutions: Probability of each A, C, G or T to become one of the other three.
    """
    draws = random.random((len(sequences), 4))
    changed = []
    for bases, (strand, keep, size, position) in zip(sequences, draws.tolist(), strict=True):
        if keep < cut and len(bases) > shortest:
            length = shortest + int(size * (len(bases) - shortest + 1))
            first = int(position * (len(bases) - length + 1))
            part = bases[first : first + length]
            bases = part if part.strip(b"N") else bases
        changed.append((strand < reverse, bases))
    reversed_ = iter(reverse_complement(_strings([bases for turn, bases in changed if turn])).to_pylist())
    found = [next(reversed_).encode() if turn else bases for turn, bases in changed]
    if shift:
        starts = np.where(random.random(len(found)) < shift, random.integers(0, _KMER, len(found)), 0)
        found = [
            bases[start:] if bases[start:].strip(b"N") else bases
            for bases, start in zip(found, starts.tolist(), strict=True)
        ]
    return [_substituted(bases, random, substitutions) for bases in found] if substitutions else found


def _substituted(bases: bytes, random: np.random.Generator, rate: float) -> bytes:
    """Replaces each of A, C, G and T by one of the other three with a probability."""
    codes = _CODES[np.frombuffer(bases, np.uint8)]
    hit = (random.random(len(codes)) < rate) & (codes < len(_BASES))
    other = (codes + random.integers(1, len(_BASES), len(codes), np.uint8)) % len(_BASES)
    return np.where(hit, _BASES[other], np.frombuffer(bases, np.uint8)).tobytes()


class TrainingBatches:
    """A grain RandomAccessDataSource whose element n is the batch of optimizer step n, counted over all epochs."""

    def __init__(self, examples: Examples, train: config.TrainConfig, vocabulary: Vocabulary, max_tokens: int):
        self._examples, self._train, self._vocabulary = examples, train, vocabulary
        self.rows = examples.rows("train")
        self._tokens = np.minimum(examples.tokens[self.rows], max_tokens)
        longest = min(max_tokens, -(-int(self._tokens.max()) // WIDTH_STEP) * WIDTH_STEP)
        self.widths = choose_widths(self._tokens, longest, train.max_shapes)
        labels = None if examples.labels is None else examples.labels[self.rows]
        order = sampler(self.rows, self._tokens, labels, train)
        # Where an epoch ends, batches of two epochs are prepared at the same time.
        self._order_of = lru_cache(maxsize=2)(lambda epoch: order(epoch=epoch))
        self.steps_per_epoch = len(self._order_of(0))

    def __repr__(self) -> str:
        return f"TrainingBatches(rows={len(self.rows)}, batch_size={self._train.batch_size})"

    def __len__(self) -> int:
        """Returns the number of steps of all epochs."""
        return self.steps_per_epoch * self._train.epochs

    def __getitem__(self, step: int) -> ExampleBatch:
        """Returns the batch of a step: its augmented rows, as tokens in the least width that holds them."""
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
            shift=self._train.start_phase,
            substitutions=self._train.substitutions,
        )
        tokens = encode(_strings(sequences), self._vocabulary)
        # A subsequence with Ns can need more tokens than the whole sequence; it is then cut at the last width.
        fitting = int(np.searchsorted(self.widths, min(int(tokens.lengths.max()), self.widths[-1])))
        vocabulary, width = self._vocabulary, self.widths[fitting]
        ids = pad_rows(tokens, np.arange(len(used)), len(rows), width, cls=vocabulary.cls_id, pad=vocabulary.pad_id)
        return _with_labels(self._examples, used, ids)


def iterate(batches: TrainingBatches, state: dict[str, Any] | None) -> "grain.DatasetIterator":
    """Returns an iterator over the batches, prepared in threads.

    Args:
        batches: All batches of the run.
        state: `get_state()` of an earlier iterator, to continue after its last batch; None to start at the first.
    """
    import grain

    dataset = grain.MapDataset.source(batches)  # pyright: ignore[reportArgumentType]
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=2 * _READERS)))
    if state is not None:
        iterator.set_state(state)
    return iterator


def evaluation_batches(
    examples: Examples, rows: Int64[np.ndarray, " rows"], shapes: Sequence[BatchShape], vocabulary: Vocabulary
) -> Iterator[ExampleBatch]:
    """Yields the rows' whole sequences, each once, cut at the last width; the last rows of a batch may be filler."""
    order, vocabulary = rows[np.argsort(examples.tokens[rows], kind="stable")], vocabulary.without_columns
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
