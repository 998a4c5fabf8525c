import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.taxa import random_tree

from bioscan_jax.model.heads import TaxonTree

PATHS = [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1, 1], [0, 1, -1, -1, -1, -1, -1]]
SIZES = (1, 2, 1, 1, 1, 1, 2)


def tree_of(paths, sizes):
    return TaxonTree(sizes, np.array(paths, np.int32).reshape(-1, 7))


def test_a_small_tree():
    tree = tree_of(PATHS, SIZES)
    species = tree.ancestors[6]
    assert list(species) == [tree.first_node(5), tree.first_node(4)]
    assert list(tree.ancestors[1]) == [1, 1]
    assert list(tree.ancestors[0]) == [0]
    assert [level.groups for level in tree.levels] == [3, 3, 2, 2, 2, 2, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_ancestors_are_those_of_every_path(seed):
    tree = random_tree(seed)
    for path in tree.leaf_paths:
        last = 0
        for rank, taxon in enumerate(path):
            if taxon >= 0:
                assert tree.ancestors[rank][taxon] == last
                last = tree.first_node(rank) + taxon


@pytest.mark.parametrize(
    ("paths", "sizes", "message"),
    [
        ([], (0,) * 7, "at least one leaf"),
        ([PATHS[0], PATHS[0]], (1,) * 7, "two leaves of the taxon tree have the same path"),
        (PATHS, (1, 2, 1, 1, 1, 1, 3), "species 2 is in 0 lineages; each of the 3 taxa"),
        ([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1, 0]], (1,) * 7, "species 0 is in 2 lineages"),
        (
            [[0, 0, -1, -1, -1, -1, -1], [0, 1, 0, -1, -1, -1, -1]],
            (1, 1, 1, 0, 0, 0, 0),
            "phylum 1 is in 1 lineages; each of the 1",
        ),
    ],
)
def test_trees_that_are_none_are_refused(paths, sizes, message):
    with pytest.raises(ValueError, match=message):
        tree_of(paths, sizes)


def test_equal_trees_are_one_static_argument():
    first, same, other = tree_of(PATHS, SIZES), tree_of(PATHS, SIZES), tree_of(PATHS[::-1], SIZES)
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    assert first != "tree"
