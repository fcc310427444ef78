"""The device mesh, and the table that maps logical axes to mesh axes."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rac3.config import InputError

AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, tuple[str, ...] | None], ...]

# Logical axis -> mesh axes. Parameters: FSDP shards `embed`; tensor parallelism shards heads, mlp and vocab (Megatron's
# column and row splits). Activations name `batch` and `heads` or `mlp`; their `seq` and `embed` are not sharded.
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("seq", None),
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

    def build(self, devices: list[Any] | None = None) -> Mesh:
        """The mesh over `devices` (default: all).

        Raises:
          InputError: the axes do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        inner = self.fsdp * self.tensor
        data = len(devices) // inner if self.data == -1 else self.data
        if data * inner != len(devices):
            raise InputError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not fit the "
                f"{len(devices)} devices; make the product {len(devices)}"
            )
        return Mesh(np.array(devices).reshape(data, self.fsdp, self.tensor), AXES, axis_types=(AxisType.Auto,) * 3)

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """The mesh axes of an array with the logical axes `names`; None is an axis that is not sharded.

        Raises:
          InputError: a name has no rule.
        """
        return _spec(self.rules, names)


@contextlib.contextmanager
def use_mesh(config: MeshConfig, mesh: Mesh) -> Iterator[Mesh]:
    """Set `mesh` and the axis rules for everything traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(config.rules):
        yield mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation by its logical axes. Without a mesh, the identity.

    Raises:
      InputError: a name has no rule.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(nn.get_logical_axis_rules(), names))


def shardings_of(config: MeshConfig, mesh: Mesh, abstract: Any) -> Any:
    """The sharding of each leaf of an abstract state; boxed leaves name their logical axes, others are replicated."""

    def one(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        return NamedSharding(mesh, config.spec(tuple(names)))

    return jax.tree.map(one, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _spec(rules: Iterable[tuple[str, str | tuple[str, ...] | None]], names: tuple[str | None, ...]) -> PartitionSpec:
    """As `MeshConfig.spec`. Flax's own lookup silently leaves an axis without a rule unsharded."""
    table = dict(rules)
    for name in names:
        if name is not None and name not in table:
            raise InputError(f"logical axis {name!r} has no rule in mesh.rules; add ({name!r}, None) or a mesh axis")
    return PartitionSpec(*(None if name is None else table[name] for name in names))
