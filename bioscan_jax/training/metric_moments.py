"""Statistics of a vector table for fitting a metric, and the metric in closed form.

One pass over the table gives everything: sums and products of the vectors, sums per species, and a bounded sample of
rows on which settings are compared. Species, genera and single rows are held out before the pass, so that the
statistics without them come from the same pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int8, Int32, Int64, UInt64

from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.embedding.encoder import unit
from bioscan_jax.errors import InputError

ORDER, FAMILY, GENUS, SPECIES = (RANKS.index(rank) for rank in ("order", "family", "genus", "species"))
Scatter = Literal["genus", "both", "species", "family"]
Products = Callable[[Float64[np.ndarray, "rows d"]], Float[np.ndarray, "d d"]]
KEPT, UNSEEN_SPECIES, UNSEEN_GENUS, SEEN_SPECIES = range(4)
"""What a row serves for while settings are compared: to fit, or as a query of one of three kinds."""
QUERIES = {UNSEEN_SPECIES: 3000, UNSEEN_GENUS: 1500, SEEN_SPECIES: 1500}
"""Most rows of each kind of query."""
_HASH_BITS = 48


@dataclass(frozen=True, eq=False)
class HoldOut:
    """The species, genera and single rows that are kept apart while settings are compared."""

    roles: Int8[np.ndarray, " species"]
    """KEPT, UNSEEN_SPECIES or UNSEEN_GENUS for each species of the label space."""
    seen: Bool[np.ndarray, " species"]
    """Kept species whose first row is a query of a seen species."""


def hold_out(space: LabelSpace, share: float, seed: int) -> HoldOut:
    """Draws the held-out taxa: species of genera that keep another species, and genera of families that keep another.

    Args:
        space: The table's taxa.
        share: Share of the species held out in each genus of several; a quarter of it is the share of genera.
        seed: Another one holds out others.

    Raises:
        InputError: No genus has two species.
    """
    rng = np.random.default_rng(seed)
    paths = space.paths[SPECIES]
    roles, genus, family = np.zeros(len(paths), np.int8), paths[:, GENUS], paths[:, FAMILY]
    members = {g: np.flatnonzero(genus == g) for g in np.unique(genus[genus >= 0]).tolist()}
    if all(len(species) < 2 for species in members.values()):
        raise InputError(
            f"none of the {len(members):,} genera has two labelled species, so there is no scatter between species of a "
            "genus to fit; add rows of further species"
        )
    left = np.bincount(family[[species[0] for species in members.values()]] + 1)
    held = set()
    for g in rng.permutation(list(members)).tolist():
        at = family[members[g][0]]
        if len(held) < max(1, round(share / 4 * len(members))) and at >= 0 and left[at + 1] > 1:
            held.add(g)
            left[at + 1] -= 1
    for g, species in members.items():
        if g in held:
            roles[species] = UNSEEN_GENUS
        elif len(species) > 1:
            count = min(int(len(species) * share + rng.random()), len(species) - 1)
            roles[rng.permutation(species)[:count]] = UNSEEN_SPECIES
    if not (roles == UNSEEN_SPECIES).any():
        species = max(members.values(), key=len)
        roles[species] = KEPT
        roles[species[0]] = UNSEEN_SPECIES
    able = np.flatnonzero((roles == KEPT) & (space.counts[SPECIES] > 1))
    seen = np.zeros(len(paths), bool)
    seen[rng.permutation(able)[: min(-(-len(able) // 2), QUERIES[SEEN_SPECIES])]] = True
    return HoldOut(roles, seen)


class Moments:
    """Sums of vectors and of their products, in float64, about a fixed point near the mean."""

    def __init__(self, shift: Float64[np.ndarray, " d"]):
        self.shift, self.rows = shift, 0
        self.total = np.zeros(len(shift))
        self.products = np.zeros((len(shift), len(shift)))

    def add(self, centred: Float64[np.ndarray, "rows d"], products: Products) -> None:
        """Adds rows from which `shift` has been subtracted."""
        if len(centred):
            self.rows += len(centred)
            self.total += centred.sum(axis=0)
            self.products += products(centred)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.shift)
        both.rows = self.rows + other.rows
        both.total, both.products = self.total + other.total, self.products + other.products
        return both

    @property
    def mean(self) -> Float64[np.ndarray, " d"]:
        """The mean of the rows."""
        return self.shift + self.total / self.rows

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The covariance of the rows, divided by their number."""
        mean = self.total / self.rows
        return self.products / self.rows - np.outer(mean, mean)


def host_products(centred: Float64[np.ndarray, "rows d"]) -> Float64[np.ndarray, "d d"]:
    """Returns the products of a block's columns, in float64.

    float32 products would be twice as fast, but their rounding (1e-6 of the largest variances) exceeds the smallest
    variances that are kept.
    """
    return centred.T @ centred


class Sample:
    """A bounded number of rows: the first row of every species before the second of any, else by a hash of the row."""

    def __init__(self, bound: int, width: int, seed: int):
        self._bound, self._seed, self._width = bound, np.uint64(seed), width
        self._vectors = np.empty((0, width), np.float32)
        self._keys, self._rows, self._species = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int32)

    def add(
        self,
        rows: Int64[np.ndarray, " n"],
        species: Int32[np.ndarray, " n"],
        earlier: Int64[np.ndarray, " n"],
        vectors: Callable[[Int64[np.ndarray, " some"]], Float32[np.ndarray, "some d"]],
    ) -> None:
        """Offers rows.

        Args:
            rows: Their numbers in the table.
            species: Their species.
            earlier: Number of earlier rows of the same species.
            vectors: Returns the vectors of some of the n rows; called only for those that enter the sample.
        """
        level = np.minimum(earlier, (1 << (64 - _HASH_BITS)) - 1).astype(np.uint64) << np.uint64(_HASH_BITS)
        keys = np.concatenate([self._keys, level | (_hashed(rows, self._seed) >> np.uint64(64 - _HASH_BITS))])
        size = len(self._keys)
        kept = np.arange(len(keys))
        if len(keys) > self._bound:
            kept = np.sort(np.argpartition(keys, self._bound - 1)[: self._bound])
        new = kept[kept >= size]
        if not len(new):
            return
        if len(kept) > len(self._vectors):  # grown at need, since most tables are smaller than the bound
            more = min(self._bound, max(len(kept), 2 * len(self._vectors))) - len(self._vectors)
            self._vectors = np.concatenate([self._vectors, np.empty((more, self._width), np.float32)])
        free = np.setdiff1d(np.arange(len(kept)), kept[kept < size])
        grown = [
            np.concatenate([old, np.empty(len(kept) - size, old.dtype)]) if len(kept) > size else old
            for old in (self._keys, self._rows, self._species)
        ]
        self._keys, self._rows, self._species = grown
        self._keys[free], self._rows[free], self._species[free] = keys[new], rows[new - size], species[new - size]
        self._vectors[free] = vectors(new - size)

    def finish(self) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, " n"]]:
        """Returns vectors and species in the table's order."""
        order = np.argsort(self._rows, kind="stable")
        return self._vectors[order], self._species[order]


def _hashed(rows: Int64[np.ndarray, " n"], seed: np.uint64) -> UInt64[np.ndarray, " n"]:
    """Mixes row numbers and a seed (splitmix64, Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    x = (rows.astype(np.uint64) + np.uint64(1)) * golden + np.multiply(seed, np.uint64(0xD1342543DE82EF95))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(eq=False)
class SpeciesSums:
    """Sums of the vectors of each species about the moments' shift, in float64, and their numbers of rows."""

    sums: Float64[np.ndarray, "species d"]
    rows: Int64[np.ndarray, " species"]

    @classmethod
    def zeros(cls, species: int, width: int) -> "SpeciesSums":
        """Returns sums of no rows."""
        return cls(np.zeros((species, width)), np.zeros(species, np.int64))

    def add(self, species: Int32[np.ndarray, " n"], centred: Float64[np.ndarray, "n d"]) -> Int64[np.ndarray, " n"]:
        """Adds rows; returns how many earlier rows of its species each has."""
        order = np.argsort(species, kind="stable")
        found, first, count = np.unique(species[order], return_index=True, return_counts=True)
        earlier = np.empty(len(species), np.int64)
        earlier[order] = np.repeat(self.rows[found] - first, count) + np.arange(len(species))
        if len(found):
            self.sums[found] += np.add.reduceat(centred[order], first, axis=0)
            self.rows[found] += count
        return earlier


@dataclass(eq=False)
class Statistics:
    """What one pass over a vector table collects; memory grows with the species and the width, not with the rows."""

    space: LabelSpace
    held: HoldOut
    labelled: Moments
    """Kept rows of known species."""
    unlabelled: Moments
    """Rows without a species; they serve the final principal axes only, for they may be of a held-out species."""
    queries: Moments
    """All rows that are held out."""
    species: SpeciesSums
    samples: dict[int, Sample] = field(default_factory=dict)
    """For each role, rows to compare settings on."""

    def without_queries(self, kinds: Sequence[Scatter], components: int) -> "ClosedForm":
        """Solves on the kept rows of known species."""
        kept = self.held.roles == KEPT
        sums = SpeciesSums(np.where(kept[:, None], self.species.sums, 0.0), np.where(kept, self.species.rows, 0))
        vectors, species = self.samples[SEEN_SPECIES].finish()
        sums.sums[species] -= vectors - self.labelled.shift
        sums.rows[species] -= 1
        return ClosedForm.of(self.labelled, self.labelled, sums, self.space.paths[SPECIES], kinds, components)

    def with_all(self, kinds: Sequence[Scatter], components: int) -> "ClosedForm":
        """Solves on all rows."""
        labelled = self.labelled + self.queries
        paths = self.space.paths[SPECIES]
        return ClosedForm.of(labelled + self.unlabelled, labelled, self.species, paths, kinds, components)


def collect(
    blocks: Iterable[tuple[Float32[np.ndarray, "_ d"], Int32[np.ndarray, "_ 7"]]],
    space: LabelSpace,
    held: HoldOut,
    *,
    sample_rows: int,
    seed: int,
    products: Products = host_products,
) -> Statistics:
    """Reads a table's vectors once.

    Args:
        blocks: Vectors, and the taxa of their rows as `space` codes them.
        space: The table's taxa.
        held: What is held out.
        sample_rows: Most kept rows in the sample.
        seed: Chooses the rows of the samples.
        products: Computes the products of a block's columns.

    Raises:
        InputError: A vector has a value that is not a number, or there are no rows.
    """
    found: Statistics | None = None
    at = 0
    for vectors, taxa in blocks:
        if not len(vectors):
            continue
        _check_finite(vectors, at)
        if found is None:
            shift, width = vectors.astype(np.float64).mean(axis=0), vectors.shape[1]
            sums = SpeciesSums.zeros(len(held.roles), width)
            samples = {role: Sample(bound, width, seed) for role, bound in ({KEPT: sample_rows} | QUERIES).items()}
            found = Statistics(space, held, Moments(shift), Moments(shift), Moments(shift), sums, samples)
        centred = vectors - found.labelled.shift
        species = taxa[:, SPECIES]
        known = np.flatnonzero(species >= 0)
        found.unlabelled.add(centred[species < 0], products)
        own = centred if len(known) == len(centred) else centred[known]
        species = species[known]
        earlier = found.species.add(species, own)
        roles = held.roles[species]
        roles[held.seen[species] & (earlier == 0)] = SEEN_SPECIES
        found.labelled.add(own[roles == KEPT], products)
        found.queries.add(own[roles != KEPT], products)
        for role, sample in found.samples.items():
            rows = known[roles == role]
            sample.add(at + rows, species[roles == role], earlier[roles == role], lambda i, r=rows, v=vectors: v[r[i]])
        at += len(vectors)
    if found is None:
        raise InputError("the table has no rows to fit on; embed the reference again")
    return found


def _check_finite(vectors: Float32[np.ndarray, "n d"], first: int) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(vectors.sum(dtype=np.float64)):
            return
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    raise InputError(
        f"the vector of row {first + int(bad[0]):,} has values that are not numbers (NaN or infinity); embed again, "
        "with --model.dtype float32 if bfloat16 overflowed, or leave such rows out with --filter"
    )


def scatter_of(
    kind: Scatter, labelled: Moments, sums: SpeciesSums, paths: Int32[np.ndarray, "species 7"]
) -> Float64[np.ndarray, "d d"]:
    """Returns the scatter within taxa of one rank: the variation that the metric should ignore.

    Args:
        kind: genus: species means about the mean of their genus, every species with the same weight. family: genus
            means about the mean of their family. species: rows about the mean of their species. both: genus and
            species added, which is the variation of a row within its genus.
        labelled: Moments of the rows in `sums`.
        sums: Sums per species; those without rows are left out.
        paths: Taxa of each species.

    Raises:
        InputError: No taxon of the rank has two members.
    """
    if kind == "both":
        return sum((scatter_of(one, labelled, sums, paths) for one in ("genus", "species")), np.zeros(1))
    there = np.flatnonzero(sums.rows)
    means = sums.sums[there] / sums.rows[there, None]
    if kind == "species":
        freedom = labelled.rows - len(there)
        if freedom < 1:
            raise InputError("no species has two rows, so there is no scatter within species; pass --scatter genus")
        return (labelled.products - (means * sums.rows[there, None]).T @ means) / freedom
    groups = paths[there, GENUS]
    if kind == "family":
        genera, first, place = np.unique(groups[groups >= 0], return_index=True, return_inverse=True)
        in_genus = groups >= 0
        means = _group_sums(means[in_genus], place, len(genera)) / np.bincount(place)[:, None]
        groups = paths[there, FAMILY][in_genus][first]
    means, groups = means[groups >= 0], groups[groups >= 0]
    _, place, count = np.unique(groups, return_inverse=True, return_counts=True)
    if not len(count) or count.max() < 2:
        raise InputError(f"no {kind} has two members, so there is no scatter within it; pass another --scatter")
    centres = _group_sums(means, place, len(count)) / count[:, None]
    away = (means - centres[place])[count[place] > 1]
    return away.T @ away / len(away)


def _group_sums(
    values: Float64[np.ndarray, "n d"], place: Int64[np.ndarray, " n"], groups: int
) -> Float64[np.ndarray, "groups d"]:
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, place, values)
    return sums


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """Principal axes of a table, and scatters along them; whitening with any settings follows without the table."""

    mean: Float64[np.ndarray, " d"]
    axes: Float64[np.ndarray, "d k"]
    variances: Float64[np.ndarray, " k"]
    """Variance along each axis, largest first."""
    scatters: dict[Scatter, Float64[np.ndarray, "k k"]]

    @classmethod
    def of(
        cls,
        moments: Moments,
        labelled: Moments,
        sums: SpeciesSums,
        paths: Int32[np.ndarray, "species 7"],
        kinds: Sequence[Scatter],
        components: int,
    ) -> "ClosedForm":
        """Solves for the principal axes, in float64.

        Args:
            moments: Of the rows that the axes describe.
            labelled: Moments of the rows in `sums`.
            sums: Sums per species.
            paths: Taxa of each species.
            kinds: Which scatters to compute.
            components: Most axes.
        """
        variances, axes = np.linalg.eigh(moments.covariance)
        variances, axes = variances[::-1][:components], _signed(axes[:, ::-1][:, :components])
        scatters: dict[Scatter, np.ndarray] = {
            kind: axes.T @ scatter_of(kind, labelled, sums, paths) @ axes for kind in kinds
        }
        return cls(moments.mean, axes, variances, scatters)

    def whitening(
        self, kind: Scatter, components: int, shrinkage: float, dimensions: int
    ) -> Float64[np.ndarray, "k m"]:
        """Returns the map from the first axes to coordinates in which the shrunk scatter is the identity.

        The scatter S becomes (1 - shrinkage) S + shrinkage trace(S) / components I (a form of Ledoit and Wolf 2004,
        doi:10.1016/S0047-259X(03)00096-4). Coordinates are ordered by their variance over all rows, which is now the
        ratio of total to within-taxon variance; the first `dimensions` are kept.

        Raises:
            InputError: The shrunk scatter is singular.
        """
        values, vectors = np.linalg.eigh(self.scatters[kind][:components, :components])
        shrunk = (1 - shrinkage) * values + shrinkage * values.mean()
        if shrunk[0] <= 1e-12 * shrunk[-1]:
            rank = int((values > 1e-12 * values[-1]).sum())
            raise InputError(
                f"--shrinkage {shrinkage:g} leaves the scatter within a {kind} singular: it has {rank} of {components} "
                f"directions; pass a larger one, or --components {max(rank, 1)} at most"
            )
        white = vectors / np.sqrt(shrunk)
        _, turn = np.linalg.eigh((white.T * self.variances[:components]) @ white)
        return _signed(white @ turn[:, ::-1])[:, :dimensions]


def _signed(columns: Float64[np.ndarray, "a b"]) -> Float64[np.ndarray, "a b"]:
    """Makes the largest value of each column positive; eigenvectors have no sign of their own."""
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return columns * np.where(largest < 0, -1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of held-out rows whose nearest neighbour (cosine) shares a taxon; NaN where there are no such rows."""

    genus: float
    """Genus, of species that the reference lacks."""
    genus_macro: float
    """The same, every species with the same weight."""
    species: float
    """Species, of single rows of species that the reference has."""
    family: float
    """Family, of genera that the reference lacks."""
    order: float
    """Order, of genera that the reference lacks."""

    def better_than(self, other: "Accuracy | None") -> bool:
        """Compares genus, then family, then species; anything is better than None."""
        mine, others = (
            [float(np.nan_to_num(x)) for x in (a.genus, a.family, a.species)] for a in (self, other or self)
        )
        return other is None or mine > others

    def __str__(self) -> str:
        """Formats the figures as one row of a table."""
        return "  ".join(f"{v:7.4f}" for v in (self.genus, self.genus_macro, self.species, self.family, self.order))


def accuracy(
    parts: dict[int, tuple[Float[np.ndarray, "_ d"], Int32[np.ndarray, " _"]]], paths: Int32[np.ndarray, "species 7"]
) -> Accuracy:
    """Finds the nearest kept row of each held-out row.

    Args:
        parts: For each role, vectors and species.
        paths: Taxa of each species.
    """
    reference, species = unit(parts[KEPT][0]), parts[KEPT][1]

    def hits(role: int, *ranks: int) -> list[Bool[np.ndarray, " n"]]:
        queries, own = parts[role]
        near = np.empty(len(own), np.int64)
        for at in range(0, len(own), 1024):
            near[at : at + 1024] = (unit(queries[at : at + 1024]) @ reference.T).argmax(axis=1)
        found, truth = paths[species[near]], paths[own]
        return [(found[:, rank] == truth[:, rank]) & (truth[:, rank] >= 0) for rank in ranks]

    (genus,) = hits(UNSEEN_SPECIES, GENUS)
    (seen,) = hits(SEEN_SPECIES, SPECIES)
    family, order = hits(UNSEEN_GENUS, FAMILY, ORDER)
    _, place, count = np.unique(parts[UNSEEN_SPECIES][1], return_inverse=True, return_counts=True)
    return Accuracy(
        genus=_mean(genus),
        genus_macro=_mean(np.bincount(place, genus, len(count)) / count),
        species=_mean(seen),
        family=_mean(family),
        order=_mean(order),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
