import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.model.config import PRESETS
from bioscan_jax.planning.flops import dots
from bioscan_jax.planning.programs import EmbedProgram

A = jnp.zeros((3, 5))
B = jnp.zeros((5, 7))
ONCE = 2 * 3 * 5 * 7


def flops(function, *arguments):
    return sum(dot.flops for dot in dots(jax.make_jaxpr(function)(*arguments)))


def test_one_product():
    (dot,) = dots(jax.make_jaxpr(jnp.matmul)(A, B))
    assert (dot.flops, dot.left, dot.right, dot.out) == (ONCE, "float32", "float32", "float32")
    assert not dot.batched


def test_pairs_of_matrices():
    (dot,) = dots(jax.make_jaxpr(jnp.matmul)(jnp.zeros((4, 3, 5)), jnp.zeros((4, 5, 7))))
    assert dot.flops == 4 * ONCE
    assert dot.batched


@pytest.mark.parametrize(("precision", "passes"), [(None, 1), ("high", 3), ("highest", 6)])
def test_passes_of_float32(precision, passes):
    product = lambda a, b: jnp.matmul(a, b, precision=precision)  # noqa: E731
    assert [dot.passes for dot in dots(jax.make_jaxpr(product)(A, B))] == [passes]
    low = dots(jax.make_jaxpr(product)(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16)))
    assert [dot.passes for dot in low] == [1]


def test_loops_count_their_length():
    def scanned(a, b):
        return jax.lax.scan(lambda carry, _: (carry + jnp.sum(a @ b), None), 0.0, None, length=11)

    assert flops(scanned, A, B) == 11 * ONCE
    nested = lambda a, b: jax.lax.fori_loop(0, 3, lambda _, x: x + scanned(a, b)[0], 0.0)  # noqa: E731
    assert flops(nested, A, B) == 33 * ONCE


def test_a_loop_of_unknown_length_is_refused():
    loop = lambda a, b: jax.lax.while_loop(lambda x: x < 5.0, lambda x: x + jnp.sum(a @ b), 0.0)  # noqa: E731
    with pytest.raises(ValueError, match="unknown before it runs"):
        flops(loop, A, B)


def test_the_costlier_branch_counts():
    def branch(a, b):
        return jax.lax.cond(jnp.sum(a) > 0, lambda: a @ b, lambda: (a @ b) @ jnp.zeros((7, 7)) @ jnp.zeros((7, 7)))

    assert flops(branch, A, B) == ONCE + 2 * (2 * 3 * 7 * 7)


def test_gradients_and_recomputation():
    loss = lambda a, b: jnp.sum((a @ b) ** 2)  # noqa: E731
    assert flops(jax.grad(loss), A, B) == 2 * ONCE
    assert flops(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * ONCE
    assert flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B) == 4 * ONCE


def test_the_work_of_all_devices_is_summed():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    a = jnp.zeros((24, 5))
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert flops(split, a, B) == 8 * ONCE


def test_a_kernel_counts_its_grid():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def call(a, b):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 8), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
            interpret=True,
        )(a, b)

    assert flops(call, jnp.zeros((32, 16)), jnp.zeros((16, 8))) == 2 * 32 * 16 * 8


@pytest.mark.parametrize("name", ["nt-v1-2.5b", "nt-v2-500m", "tiny-v2"])
def test_the_embedding_step_equals_the_formula(name):
    transformer, shape = PRESETS[name], BatchShape(16, 128)
    program = EmbedProgram(transformer=transformer, dtype="bfloat16", embed=config.EmbedConfig())
    step, arguments = program.build(make_layout(config.MeshConfig()), shape)
    found = dots(step.trace(*arguments).jaxpr)
    assert sum(dot.flops for dot in found) == transformer.forward_flops(16 * 128, 128)
    weights = [dot for dot in found if not dot.batched]
    assert {(dot.left, dot.right, dot.out) for dot in weights} == {("bfloat16", "bfloat16", "float32")}
    expected = 2 * 16 * 128 * transformer.num_hidden_layers * transformer.layer_matmul_parameters
    assert sum(dot.flops for dot in weights) == expected
    if name == "nt-v1-2.5b":
        analytic = 16 * 128 * (2 * 2.517e9 + 32 * 4 * 128 * 2560)
        np.testing.assert_allclose(sum(dot.flops for dot in found), analytic, rtol=1e-3)
