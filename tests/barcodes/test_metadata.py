import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from support.taxa import random_labels, random_tree

from bioscan_jax.barcodes.metadata import check_metadata, find_metadata
from bioscan_jax.errors import InputError
from bioscan_jax.model.metadata import MetadataEncoder, metadata_features
from bioscan_jax.training.losses import rank_losses, total_loss

NAN = math.nan
TREE = random_tree(3)


def table(**columns):
    given = {"depth": [10.0, None], "latitude": [-90, 90], "longitude": [180.0, NAN]} | columns
    return pa.table({name: values for name, values in given.items() if values is not None})


def test_columns_become_one_array():
    got = check_metadata(table())
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[10, -90, 180], [NAN, 90, NAN]])
    np.testing.assert_array_equal(check_metadata(table(depth=pa.nulls(2)))[:, 0], [NAN, NAN])
    assert check_metadata(table().slice(0, 0)).shape == (0, 3)
    chunks = pa.concat_tables([table(), table(depth=[-10.0, 12000.0])])
    np.testing.assert_array_equal(check_metadata(chunks)[:, 0], [10, NAN, -10, 12000])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"latitude": [0.0, 400.0]},
            "the latitude 400 of row 101 is outside -90 to 90 .1 such .*set it to null",
        ),
        ({"latitude": [-90.5, 91.0]}, r"the latitude -90.5 of row 100 is outside -90 to 90 \(2 such"),
        ({"longitude": [0, 181]}, "the longitude 181 of row 101 is outside -180 to 180"),
        ({"longitude": [0.0, -math.inf]}, "the longitude -inf of row 101 is outside"),
        ({"longitude": [-999, 0]}, "the longitude -999 of row 100 is a filler, not a value .* set it to null"),
        ({"depth": [0, -9999]}, "the depth -9999 of row 101 is a filler"),
        ({"depth": [9999, 0]}, "the depth 9999 of row 100 is a filler"),
        ({"depth": [12001.0, 0]}, "the depth 12001 of row 100 is outside -10 to 12000"),
        ({"depth": [0, -11.0]}, "the depth -11 of row 101 is outside -10 to 12000"),
        ({"depth": ["10 m", "x"]}, "the column depth is of type string; make it numbers"),
        ({"depth": None}, "there is no column depth, which metadata needs; add it"),
    ],
)
def test_bad_metadata_is_refused(columns, message):
    with pytest.raises(InputError, match=message) as caught:
        check_metadata(table(**columns), locate=lambda row: f"row {100 + row}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts",
    [
        ["[44.5, -80.25]", None, " "],
        ["44.5,-80.25", "", None],
        ["(44.5;-80.25)", None, None],
        ["44.5 N 80.25 W", None, None],
        ["[44.5, -80.25]", None, "[-3, 170.]"],
    ],
)
def test_latitude_and_longitude_in_one_column_are_split(texts):
    joined = pa.table({"coord": pa.array(texts, pa.string()), "depth": [1.0] * 3})
    places = find_metadata(joined.column_names)
    assert places == {"depth": "depth", "latitude": "coord", "longitude": "coord"}
    last = [1, -3, 170] if "170" in (texts[2] or "") else [1, NAN, NAN]
    np.testing.assert_array_equal(check_metadata(joined, columns=places), [[1, 44.5, -80.25], [1, NAN, NAN], last])


@pytest.mark.parametrize("text", ["44.5", "44.5, -80.25, 3", "x, y", "44.5 S S 3", "NA"])
def test_coordinates_that_cannot_be_read_name_their_row(text):
    joined = pa.table({"lat_lon": ["[1, 2]", text], "depth": [1.0, 2.0]})
    with pytest.raises(InputError, match=r"of row 101 cannot be read \(1 such"):
        check_metadata(joined, locate=lambda row: f"row {100 + row}", columns=find_metadata(joined.column_names))


def test_columns_of_their_own_go_before_a_joined_one():
    assert find_metadata(["coord", "lat", "decimalLongitude"]) == {"latitude": "lat", "longitude": "decimalLongitude"}


def test_features():
    got = metadata_features(
        jnp.array([[0.0, 0.0, 0.0], [12000.0, 90.0, 50.0], [-5.0, 30.0, 180.0], [NAN, 1.0, NAN], [7.0, NAN, 3.0]])
    )
    depth = np.log1p([5.0, 7.0]) / np.log1p(12000)
    half = math.sqrt(3) / 2
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [-half, 0, 0.5, -depth[0], 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, depth[1], 1, 0],
    ]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_date_line_and_the_poles_have_no_seam():
    near = metadata_features(
        jnp.array([[1.0, 10.0, 179.999], [1.0, 10.0, -179.999], [1.0, 90.0, 0.0], [1.0, 90.0, 90.0]])
    )
    np.testing.assert_allclose(near[0], near[1], atol=1e-4)
    np.testing.assert_allclose(near[2], near[3], atol=1e-6)


@pytest.mark.parametrize("kind", ["independent", "marginal"])
def test_missing_values_get_no_gradient(kind):
    """Tests every combination of missing values."""
    graph, state = nnx.split(MetadataEncoder(kind, TREE, rngs=nnx.Rngs(0), hidden_size=8))
    labels = jnp.asarray(random_labels(0, TREE, 8))
    rows = jnp.array(list(itertools.product([100.0, NAN], [45.0, NAN], [-120.0, NAN])), jnp.float32)

    def loss(state, metadata):
        return total_loss(rank_losses(nnx.merge(graph, state).of_labels(metadata, labels), labels))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for metadata in (rows, *(jnp.tile(row[None], (8, 1)) for row in rows)):
        value, (by_state, by_input) = step(state, metadata)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(by_state))
        assert not np.any(np.asarray(by_input)[np.isnan(metadata)])
        assert np.any(np.asarray(by_state["first"]["kernel"].get_value()) != 0)


def test_a_missing_value_differs_from_zero():
    """A sample at depth 0 on the equator differs from one without metadata."""
    encoder = MetadataEncoder("independent", TREE, rngs=nnx.Rngs(0), hidden_size=8)
    ranks = encoder(jnp.array([[0.0, 0.0, 0.0], [NAN, NAN, NAN]]))
    species = np.asarray(ranks.log_probs[6])[:, : TREE.sizes[6]]
    assert np.abs(species[0] - species[1]).max() > 1e-4
