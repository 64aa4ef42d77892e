"""The device mesh, and the one table that says how arrays lie on it."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pplug_jax.errors import InputError

M = TypeVar("M", bound=nnx.Module)

# Slices are joined by the data-centre network, which is slow: only rows are split over them, and a
# step sends each of them one gradient of the plug. All other axes lie within a slice.
AXES = ("slice", "data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes it is split over. Every other logical axis is replicated.
RULES: dict[str | None, str | tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: int = 1,
) -> Mesh:
    """Make a mesh over the devices.

    Args:
        data: devices that split the batch; -1 takes what the other axes leave.
        fsdp: devices that split the batch and the weights.
        tensor: devices that split every layer.
        devices: the devices; None is all.
        slices: TPU slices that work together.

    Raises:
        InputError: the axes do not multiply to the number of devices, or the number of slices
            differs.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = max(1, len(devices) // (slices * fsdp * tensor))
    shape = (slices, data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise InputError(
            f"the mesh slices={slices} x data={data} x fsdp={fsdp} x tensor={tensor} needs "
            f"{math.prod(shape)} devices, but there are {len(devices)}: change config.mesh"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices_present = len({getattr(device, "slice_index", 0) for device in devices})
    # Unlike `jax.make_mesh`, which refuses an axis that is a part of one of the slice's own.
    split = {"allow_split_physical_axes": True}
    if slices_present == 1:  # one slice, or a platform without, which may be told to act as several
        placed = create_device_mesh(shape, devices, **split)
    elif slices == slices_present:
        placed = create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1, 1), devices, **split)
    else:
        raise InputError(
            f"there are {slices_present} slices: set config.mesh.slices={slices_present}"
        )
    return Mesh(placed, AXES, axis_types=types)


def sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Return how an array of `shape` with logical `axes` lies on the mesh.

    A dimension that its mesh axes do not divide is replicated, which is never wrong, only larger.
    Odd vocabularies of LLMs are padded before they come here.
    """
    spec = [
        RULES.get(axis) if size % parts(mesh, axis) == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def parts(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Return the number of pieces that a logical axis is cut into."""
    names = RULES.get(axis, ())
    return math.prod(mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay out `x` with logical `axes` on the mesh of `jax.set_mesh`, if there is one.

    Without this the compiler follows the weights' shards, and may hold every row on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape).spec)


def rows(x: jax.Array) -> jax.Array:
    """Keep activations (B, ...) split over their rows, whatever the weights' shards."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Return the rows of a batch of `size` on this process' devices, in order; (n,) int64."""
    pieces = sharding(mesh, ("batch",), (size,)).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[piece] for piece in pieces.values()]))


def place_rows(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """Make a global array (B, ...), split over its rows, from every process' part.

    Args:
        local: (n, ...), the rows that `local_rows(mesh, B)` names.
        mesh: the mesh to lay it out on.
    """
    pieces = parts(mesh, "batch")
    size = len(local) * pieces // len(local_rows(mesh, pieces))
    shape = (size, *local.shape[1:])
    rows = local_rows(mesh, size)

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        first = np.searchsorted(rows, start)
        return local[first : first + stop - start]

    where = sharding(mesh, ("batch", *[None] * (local.ndim - 1)), shape)
    return jax.make_array_from_callback(shape, where, piece)


def shardings(module: nnx.Module, mesh: Mesh) -> nnx.State:
    """Return the sharding of every array of `module`, from its variables' logical axes."""

    def of(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")
        # A quantised variable has several arrays of the same axes.
        return variable.replace(
            jax.tree.map(lambda x: sharding(mesh, axes, x.shape), variable.get_value())
        )

    return jax.tree.map(of, nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable))


def place(module: M, mesh: Mesh) -> M:
    """Lay out the arrays of `module` on `mesh`."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state, shardings(module, mesh)))


def place_abstract(module: M, mesh: Mesh) -> M:
    """Say where the arrays of an abstract `module` would lie on `mesh`."""
    graph, state = nnx.split(module)
    return nnx.merge(
        graph,
        jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            state,
            shardings(module, mesh),
        ),
    )
