"""The device mesh and the rules that map logical axes to mesh axes: the only place that names mesh axes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bioscan_jax import config
from bioscan_jax.devices.compile_cache import use_compile_cache
from bioscan_jax.devices.hosts import initialize_distributed
from bioscan_jax.errors import InputError

Axes = tuple[str | None, ...]
"""Logical axis of each dimension of an array: batch, layer, vocab, position, hidden, heads, mlp, taxa or None."""
Tree = TypeVar("Tree")

_TENSOR_PARALLEL = {"heads": "model", "mlp": "model"}
_FULLY_SHARDED = {"hidden": "data"}
_CLASSES = {"taxa": "data"}


@dataclass(frozen=True)
class Layout:
    """How arrays are split over a mesh: batches over `data`, parameters by the rules above.

    Example:
        >>> import bioscan_jax as bj
        >>> layout = bj.make_layout(bj.MeshConfig(data=1))
        >>> layout.batched(2).spec
        P('data', None)
    """

    mesh: jax.sharding.Mesh
    params: Literal["replicated", "fsdp"] = "replicated"

    @property
    def data_devices(self) -> int:
        """Devices that split the batch."""
        return self.mesh.shape["data"]

    @property
    def head_devices(self) -> int:
        """Devices that split one layer's heads."""
        return self.mesh.shape["model"]

    def stored(self, axes: Axes) -> NamedSharding:
        """Returns the sharding of a parameter with these logical axes between uses."""
        rules = _TENSOR_PARALLEL | _CLASSES | (_FULLY_SHARDED if self.params == "fsdp" else {})
        return self._sharding(axes, rules)

    def gathered(self, axes: Axes) -> NamedSharding:
        """Returns the sharding of a parameter while it is used: never split over the batch's devices."""
        return self._sharding(axes, _TENSOR_PARALLEL)

    def batched(self, rank: int) -> NamedSharding:
        """Returns the sharding of an array of this rank whose first axis is the batch."""
        return NamedSharding(self.mesh, P("data", *(None,) * (rank - 1)))

    def accumulated(self, rank: int) -> NamedSharding:
        """Returns the sharding of an array of this rank with micro-batches first and the batch second."""
        return NamedSharding(self.mesh, P(None, "data", *(None,) * (rank - 2)))

    @property
    def is_single_cpu(self) -> bool:
        """Whether the mesh is one CPU device, which shares the host's memory."""
        return self.mesh.devices.size == 1 and self.mesh.devices.flat[0].platform == "cpu"

    def replicated(self) -> NamedSharding:
        """Returns the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, P())

    def gather(self, tree: Tree) -> Tree:
        """Constrains the parameters in `tree` (of one layer, inside the scan) to `gathered`."""

        def constrain(variable: nnx.Variable) -> nnx.Variable:
            axes = variable.get_metadata().get("logical_axes")
            if axes is None:
                return variable
            return variable.replace(jax.lax.with_sharding_constraint(variable.get_value(), self.gathered(axes)))

        return jax.tree.map(constrain, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def on_batch(self, x: jax.Array) -> jax.Array:
        """Constrains an activation to be split along its first axis only."""
        return jax.lax.with_sharding_constraint(x, self.batched(x.ndim))

    def map_rows_and_heads(
        self, function: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    ) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
        """Runs `function` on each device's own rows and heads, for kernels that the compiler cannot split.

        Args:
            function: Takes three arrays with rows and heads as first axes and one with rows as first axis, and returns
                one like the first three. Rows and heads must be multiples of their numbers of devices.
        """
        heads, rows = P("data", "model"), P("data")
        # check_vma is off since kernels do not declare over which axes their results vary.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )

    def _sharding(self, axes: Axes, rules: dict[str, str]) -> NamedSharding:
        named = [rules.get(axis) if axis is not None else None for axis in axes]
        used = [axis for axis in named if axis is not None]
        if len(set(used)) != len(used):
            raise InputError(f"logical axes {axes} map two dimensions to one mesh axis: {named}")
        return NamedSharding(self.mesh, P(*named))


def stored_shardings(state: nnx.State, layout: Layout) -> dict[tuple, NamedSharding]:
    """Returns the sharding of each parameter in an (abstract) state, by its path.

    Raises:
        InputError: A dimension is not divisible by the devices it is split over.
    """

    def sharding_of(path: tuple, variable: nnx.Variable) -> NamedSharding:
        axes = parameter_axes(path, variable)
        sharding = layout.stored(axes)
        shape = variable.get_value().shape
        for size, axis, name in zip(shape, axes, sharding.spec, strict=True):
            if name is not None and size % layout.mesh.shape[name]:
                flag = "mesh.model" if name == "model" else "mesh.data"
                raise InputError(
                    f"{'.'.join(map(str, path))}: {axis} {size} is not divisible by --{flag} {layout.mesh.shape[name]}"
                )
        return sharding

    return {path: sharding_of(path, variable) for path, variable in nnx.to_flat_state(state)}


def parameter_axes(path: Sequence, variable: nnx.Variable) -> Axes:
    """Returns the logical axes of a parameter; in the stacked layers they start with `layer`."""
    axes = variable.get_metadata()["logical_axes"]
    return ("layer", *axes) if "layers" in path else axes


def make_layout(mesh: config.MeshConfig, *, local: bool = False) -> Layout:
    """Builds the layout that the settings ask for from the available devices.

    Args:
        mesh: The mesh settings.
        local: Use only this process's devices, for work that several processes do independently.

    Raises:
        InputError: The settings ask for more devices than there are.

    Example:
        >>> make_layout(config.MeshConfig(data=1)).data_devices
        1
    """
    devices = jax.local_devices() if local else jax.devices()
    data = mesh.data if mesh.data != -1 else len(devices) // mesh.model
    if data * mesh.model > len(devices) or data < 1:
        raise InputError(
            f"--mesh.data {mesh.data} x --mesh.model {mesh.model} needs more than the {len(devices)} "
            f"{devices[0].platform} device(s) here; lower one of them"
        )
    chosen = np.array(devices[: data * mesh.model]).reshape(data, mesh.model)
    return Layout(jax.sharding.Mesh(chosen, ("data", "model"), axis_types=(AxisType.Auto,) * 2), mesh.params)


def start_devices(mesh: config.MeshConfig) -> None:
    """Sets up the compilation cache and the connection between processes; call it before any device is used."""
    if mesh.compilation_cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        use_compile_cache(mesh.compilation_cache)
    if mesh.distributed:
        initialize_distributed(mesh)


def compute_dtype(wanted: Literal["auto", "bfloat16", "float32"]) -> jax.typing.DTypeLike:
    """Returns the dtype of parameters and matrix products: auto is float32 on CPU, bfloat16 elsewhere."""
    if wanted == "auto":
        return jax.numpy.float32 if jax.default_backend() == "cpu" else jax.numpy.bfloat16
    return jax.numpy.dtype(wanted)
