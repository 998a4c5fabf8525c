"""Random taxon trees with gaps, as plain arrays."""

import numpy as np

from bioscan_jax.model.heads import TaxonTree

ROWS = 6


def random_tree(seed, *, branching=3, gap=0.3, end=0.15):
    """Grows a random tree; `gap` and `end` are the probabilities of an unknown rank and of an early end."""
    rng = np.random.default_rng(seed)
    sizes, paths = [0] * 7, []

    def grow(path):
        rank = len(path)
        if rank == 7 or (rank > 1 and path[-1] >= 0 and rng.random() < end):
            paths.append([*path, *[-1] * (7 - rank)])
            return
        for _ in range(rng.integers(1, branching + 1)):
            sizes[rank] += 1
            grow([*path, sizes[rank] - 1])
        if rank < 6 and rng.random() < gap:
            grow([*path, -1])

    grow([])
    keep = [path for path in paths if max(path) >= 0 and not is_prefix(path, paths)]
    return TaxonTree(tuple(sizes), np.array(keep, np.int32)[rng.permutation(len(keep))])


def is_prefix(path, paths):
    """Returns whether a path is the beginning of another one, so that its last taxon is no leaf."""
    known = max(i for i, taxon in enumerate(path) if taxon >= 0) + 1
    return any(other is not path and other[:known] == path[:known] for other in paths)


def flat_tree(species, per=(1, 2, 4, 20, 200, 3000)):
    """Returns a regular tree; species i is below taxon i * count // species of each rank above."""
    index = np.arange(species)
    paths = np.stack([*(index * count // species for count in per), index], axis=1).astype(np.int32)
    return TaxonTree((*per, species), paths)


def random_labels(seed, tree, rows=ROWS):
    """Returns paths to leaves in which random ranks are unknown."""
    rng = np.random.default_rng(seed)
    labels = tree.leaf_paths[rng.integers(0, len(tree.leaf_paths), rows)]
    return np.where(rng.random(labels.shape) < 0.3, -1, labels).astype(np.int32)
