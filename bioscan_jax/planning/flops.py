"""Counts the FLOPs of a traced function's matrix products, with loops unrolled and all devices summed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

_PASSES = {jax.lax.Precision.DEFAULT: 1, jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}


@dataclass(frozen=True)
class Dot:
    """One matrix product (`dot_general`) of a program."""

    flops: int
    """2 x multiply-adds, over all its executions."""
    left: str
    right: str
    out: str
    """Dtype names of the operands and the result."""
    batched: bool
    """Whether pairs of matrices are multiplied, as in attention; false for a product with a weight."""
    passes: int
    """bfloat16 passes of a TPU's matrix unit: 6 for float32 operands at the highest precision, 3 at high, else 1."""


def dots(jaxpr: Jaxpr | ClosedJaxpr) -> list[Dot]:
    """Lists all matrix products of a traced function; XLA's own cost analysis counts a loop's body only once.

    Args:
        jaxpr: From `jax.jit(...).trace(...)` or `jax.make_jaxpr`.

    Raises:
        ValueError: A product is in a loop whose length is unknown before it runs.
    """
    return list(_dots(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr))


def _dots(jaxpr: Jaxpr) -> Iterator[Dot]:
    for eqn in jaxpr.eqns:
        name, times = eqn.primitive.name, 1
        if name == "dot_general":
            yield _dot(eqn)
            continue
        inner = [list(_dots(part)) for part in _parts(eqn.params)]
        if name == "while" and any(inner):
            raise ValueError("a matrix product is in a while loop, whose length is unknown before it runs")
        if name == "cond":
            inner = [max(inner, key=lambda branch: sum(dot.flops for dot in branch))]
        elif name == "scan":
            times = eqn.params["length"]
        elif name == "shard_map":
            times = eqn.params["mesh"].size
        elif name == "pallas_call":
            times = math.prod(eqn.params["grid_mapping"].grid)
        for part in inner:
            for dot in part:
                yield replace(dot, flops=dot.flops * times)


def _parts(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _dot(eqn: JaxprEqn) -> Dot:
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    arrays: list[Any] = [variable.aval for variable in (*eqn.invars, eqn.outvars[0])]
    left, right, out = arrays
    depth = math.prod(left.shape[axis] for axis in contracted)
    precision = eqn.params["precision"]
    asked = precision[0] if isinstance(precision, tuple) else precision
    whole = left.dtype == jax.numpy.float32 and right.dtype == jax.numpy.float32
    return Dot(
        flops=2 * depth * out.size,
        left=left.dtype.name,
        right=right.dtype.name,
        out=out.dtype.name,
        batched=bool(batch),
        passes=_PASSES.get(asked, 1) if whole else 1,
    )
