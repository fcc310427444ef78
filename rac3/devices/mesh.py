"""The device mesh, and the table that maps logical axes to mesh axes."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rac3.config import InputError

AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, tuple[str, ...] | None], ...]

# Logical axis -> mesh axes. Parameters: FSDP shards `embed`; tensor parallelism shards heads, mlp and vocab (Megatron's
# column- and row-parallel layers). Activations name `batch`, and `heads` or `mlp`; the residual stream and the norms
# name `seq` instead, which tensor parallelism shards too (arXiv 2205.05198), and leave `embed` whole.
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("seq", ("tensor",)),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("head_dim", None),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("positions", None),
    ("layers", None),
)


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; `data=-1` takes all that the other two leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Annotated[Rules, tyro.conf.Fixed, tyro.conf.Suppress] = DEFAULT_RULES  # in configs, not on the command line

    def __post_init__(self) -> None:
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise InputError(f"mesh.{name}={getattr(self, name)} is below 1; use at least 1")
        if self.data == 0 or self.data < -1:
            raise InputError(f"mesh.data={self.data} is not a size; use -1 (all devices left) or at least 1")

    def build(self, devices: list[Any] | None = None) -> "DeviceMesh":
        """The mesh over `devices` (default: all).

        Raises:
          InputError: the axes do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        grid = np.array(devices).reshape(self.shape(len(devices)))
        return DeviceMesh(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), self.rules)

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The sizes of `AXES` for so many devices.

        Raises:
          InputError: the axes do not multiply to the number of devices.
        """
        inner = self.fsdp * self.tensor
        data = devices // inner if self.data == -1 else self.data
        if data * inner != devices:
            raise InputError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not fit the "
                f"{devices} devices; make the product {devices}"
            )
        return data, self.fsdp, self.tensor

    def planned(self, devices: int) -> "DeviceMesh":
        """The mesh of devices that are not here: arrays on it have shardings, but can't be made.

        Raises:
          InputError: as `build`.
        """
        sizes = self.shape(devices)
        return DeviceMesh(AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)), self.rules)


@dataclass(frozen=True)
class DeviceMesh:
    """Devices in a grid of `AXES`, and the rules that shard arrays over it by their logical axes."""

    jax_mesh: Mesh | AbstractMesh
    rules: Rules

    def spec(self, *names: str | None) -> PartitionSpec:
        """The mesh axes of an array with the logical axes `names`; an axis of no name (None) is not sharded.

        Raises:
          InputError: a name has no rule.
        """
        return _spec(self.rules, names)

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array whose first axes are `names`. Without names, every device holds all of it.

        Raises:
          InputError: a name that has no rule.
        """
        return NamedSharding(self.jax_mesh, self.spec(*names))

    def num_shards(self, name: str) -> int:
        """Into how many shards an array is split along the logical axis `name`.

        Raises:
          InputError: a name that has no rule.
        """
        return math.prod(self.jax_mesh.shape[axis] for axis in _mesh_axes(self.rules, name) or ())

    def share(self, rows: int) -> tuple[int, int]:
        """Into how many shares the processes divide the rows of a global batch, and which one this process feeds.

        Share i of n is rows [i * rows / n, (i + 1) * rows / n). Processes whose devices hold the same rows, as those of
        one tensor group do, feed the same share.

        Raises:
          InputError: the rows can't be divided over the mesh, or the devices of a process hold other rows than a share.
        """
        shards = self.num_shards("batch")
        if rows % shards:
            raise InputError(
                f"a batch of {rows} rows can't be divided over the {shards} shards of mesh.data x mesh.fsdp; use a "
                f"multiple of {shards}, or a smaller mesh.data x mesh.fsdp"
            )
        held: dict[int, set[int]] = {}
        held_by: Mapping[Any, Any] = self.sharding("batch").devices_indices_map((rows,))
        for device, (index,) in held_by.items():
            held.setdefault(device.process_index, set()).update(range(rows)[index])
        return share_of(held, rows, jax.process_index())

    def abstract(self, boxed: Any) -> Any:
        """A tree of arrays that are not allocated: shapes, dtypes, and shardings on this mesh.

        Args:
          boxed: shapes and dtypes, as of `jax.eval_shape`; leaves may be boxed with the names of their logical axes.

        Raises:
          InputError: a name that has no rule, or an axis that can't be divided over the mesh.
        """

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            value, names = (leaf.value, leaf.names) if isinstance(leaf, nn.LogicallyPartitioned) else (leaf, ())
            for name, size in zip(names, value.shape, strict=False):
                if name is not None and size % self.num_shards(name):
                    axes = " x ".join(f"mesh.{axis}" for axis in _mesh_axes(self.rules, name) or ())
                    raise InputError(
                        f"{name}={size} of the model can't be divided by {axes}={self.num_shards(name)}; "
                        f"use a divisor of {size}, or a multiple of {self.num_shards(name)} for {name}"
                    )
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=self.sharding(*names))

        return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Sets the mesh and the rules for everything that is traced inside."""
        mesh: Any = self.jax_mesh  # JAX refuses an abstract one
        with jax.set_mesh(mesh), nn.logical_axis_rules(self.rules):
            yield


def share_of(held: Mapping[int, set[int]], rows: int, process: int) -> tuple[int, int]:
    """The number of shares, and that of `process`.

    Args:
      held: the rows that the devices of each process hold.

    Raises:
      InputError: these are no equal shares of consecutive rows.
    """
    size = len(held[process])
    for each, own in sorted(held.items()):
        start = min(own)
        if len(own) != size or start % size or max(own) != start + size - 1:
            raise InputError(
                f"on this mesh the devices of process {each} hold {len(own)} of the {rows} rows of a batch, from row "
                f"{start} on, and those of process {process} hold {size}, so they can't be fed by equal shares; make "
                "mesh.fsdp x mesh.tensor, or mesh.tensor, a divisor or a multiple of the devices of a process"
            )
    return rows // size, min(held[process]) // size


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shards an activation by its logical axes, by the rules of the mesh in use. Without a mesh it is the identity.

    Raises:
      InputError: a name has no rule.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(nn.get_logical_axis_rules(), names))


def map_shards(
    function: Callable[..., Any], inputs: Sequence[Sequence[str | None]], outputs: Any
) -> Callable[..., Any]:
    """`function`, run by each device on its shards of the arrays, by the rules of the mesh in use. Without a mesh it is
    the function itself.

    Args:
      inputs: the logical axes of each argument.
      outputs: the logical axes of the result, or a list of them for a function of several results.

    Raises:
      InputError: a name has no rule.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    rules = nn.get_logical_axis_rules()
    several = isinstance(outputs, list)
    out_specs: Any = tuple(_spec(rules, each) for each in outputs) if several else _spec(rules, outputs)
    return jax.shard_map(
        function, in_specs=tuple(_spec(rules, each) for each in inputs), out_specs=out_specs, check_vma=False
    )


def mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh in use that a logical axis is sharded over; none without a mesh.

    Raises:
      InputError: the name has no rule.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return ()
    return _mesh_axes(nn.get_logical_axis_rules(), name) or ()


def is_sharded() -> bool:
    """Whether the mesh in use has several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


def _spec(rules: Iterable[tuple[str, Any]], names: Iterable[str | None]) -> PartitionSpec:
    return PartitionSpec(*(None if name is None else _mesh_axes(rules, name) for name in names))


def _mesh_axes(rules: Iterable[tuple[str, Any]], name: str) -> tuple[str, ...] | None:
    """What the table says of a logical axis. Flax's own lookup would silently replicate an axis that has no rule."""
    table = dict(rules)
    if name not in table:
        raise InputError(f"logical axis {name!r} has no rule in mesh.rules; add ({name!r}, None) or a mesh axis")
    return table[name]
