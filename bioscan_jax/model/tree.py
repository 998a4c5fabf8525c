"""The taxa as the heads see them: the paths to those without children, and what follows from them.

All of it is numpy and fixed when a program is compiled; nothing has the size of leaves times taxa.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from bioscan_jax.barcodes.lineage import RANKS


class _Level(NamedTuple):
    """How the log-probabilities at one rank come from those of the groups of leaves at the rank below."""

    group_of: Int32[np.ndarray, " below"] | None
    """Group of each group below; None where each stays by itself."""
    groups: int
    taxa: Int32[np.ndarray, " taxa"]
    """Group of each taxon of the rank; the other groups have no taxon there."""


@dataclass(frozen=True, eq=False)
class TaxonTree:
    """The taxa of each rank and the paths to those without children.

    Raises:
        ValueError: There is no leaf, a leaf is there twice, or a taxon is in no path or in two lineages.
    """

    sizes: tuple[int, ...]
    """Taxa at each of the seven ranks."""
    leaf_paths: Int32[np.ndarray, "leaves 7"]
    """Taxon at each rank, -1 below the leaf and where a rank is unknown; row i is class i of `MarginalHead`."""

    def __post_init__(self) -> None:
        if not len(self.leaf_paths):
            raise ValueError("a taxon tree needs at least one leaf")
        assert self.levels

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaxonTree):
            return NotImplemented
        return other is self or (self.sizes == other.sizes and np.array_equal(self.leaf_paths, other.leaf_paths))

    def __hash__(self) -> int:
        return hash((self.sizes, len(self.leaf_paths)))

    @cached_property
    def levels(self) -> tuple[_Level, ...]:
        """One step a rank, species first: leaves with the same path down to a rank are one group there."""
        paths, levels = self.leaf_paths, []
        for rank in reversed(range(len(RANKS))):
            distinct, group_of = np.unique(paths[:, : rank + 1], axis=0, return_inverse=True)
            if len(distinct) == len(paths):
                group_of = None
            elif rank == len(RANKS) - 1:
                raise ValueError("two leaves of the taxon tree have the same path")
            else:
                paths, group_of = distinct, group_of.reshape(-1).astype(np.int32)
            named = np.flatnonzero(paths[:, rank] >= 0)
            counts = np.bincount(paths[named, rank], minlength=self.sizes[rank])
            wrong = np.flatnonzero((counts != 1) | (np.arange(len(counts)) >= self.sizes[rank]))
            if len(wrong):
                raise ValueError(
                    f"{RANKS[rank]} {wrong[0]} is in {counts[wrong[0]]} lineages; each of the {self.sizes[rank]} "
                    "taxa from 0 up is in one"
                )
            taxa = np.empty(len(named), np.int32)
            taxa[paths[named, rank]] = named
            levels.append(_Level(group_of, len(paths), taxa))
        return tuple(levels)

    @cached_property
    def ancestors(self) -> tuple[Int32[np.ndarray, " taxa"], ...]:
        """The nearest known taxon above each taxon of a rank, as its `node` number; 0 where there is none."""
        found = []
        for rank, size in enumerate(self.sizes):
            row = np.zeros(size, np.int64)
            named = self.leaf_paths[:, rank] >= 0
            row[self.leaf_paths[named, rank]] = np.flatnonzero(named)
            above = np.zeros(size, np.int32)
            for higher in range(rank):
                taxon = self.leaf_paths[row, higher]
                above = np.where(taxon >= 0, self.first_node(higher) + taxon, above).astype(np.int32)
            found.append(above)
        return tuple(found)

    def first_node(self, rank: int) -> int:
        """Number of taxon 0 of a rank when all taxa are numbered from 1, rank after rank."""
        return 1 + sum(self.sizes[:rank])
