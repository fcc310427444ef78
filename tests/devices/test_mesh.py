"""The mesh, the rules table, and the shards of a model of the paper's size."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig, constrain, share_of
from rac3.model.transformer import TransformerConfig
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, new_state


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=4, tensor=2), (1, 4, 2)),
    ],
)
def test_the_mesh_holds_every_device_once(config: MeshConfig, shape: tuple[int, int, int]):
    mesh = config.build().jax_mesh
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert MeshConfig().build(jax.devices()[:1]).jax_mesh.devices.shape == (1, 1, 1)


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=16), MeshConfig(data=2, fsdp=2)]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config: MeshConfig):
    with pytest.raises(InputError, match="8 devices"):
        config.build()


@pytest.mark.parametrize("sizes", [{"fsdp": 0}, {"tensor": -1}, {"data": 0}, {"data": -2}])
def test_sizes_are_checked(sizes: dict[str, int]):
    with pytest.raises(InputError, match=f"mesh.{next(iter(sizes))}="):
        MeshConfig(**sizes)


def test_an_axis_without_a_rule_raises_wherever_it_is_named():
    mesh = MeshConfig().build()
    boxed = {"kernel": nn.LogicallyPartitioned(jnp.zeros((4, 8)), ("embed", "experts"))}
    with pytest.raises(InputError, match=r"'experts' has no rule.*add \('experts', None\)"):
        mesh.spec("embed", "experts")
    with pytest.raises(InputError, match="'experts' has no rule"):
        mesh.num_shards("experts")
    with pytest.raises(InputError, match="'experts' has no rule"):
        mesh.abstract(boxed)
    with mesh.use(), pytest.raises(InputError, match="'experts' has no rule"):
        jax.jit(lambda x: constrain(x, "batch", "experts")).lower(jnp.zeros((8, 8)))
    own = MeshConfig(rules=(*mesh.rules, ("experts", ("fsdp",)))).build()
    assert own.spec("experts", None) == PartitionSpec(("fsdp",), None)


def test_the_number_of_shards_is_that_of_the_axes_of_the_rule():
    mesh = MeshConfig(fsdp=2, tensor=2).build()
    assert [mesh.num_shards(name) for name in ("batch", "embed", "heads", "layers")] == [4, 2, 2, 1]


def test_constrain_lays_an_activation_out():
    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(constrain(x, "no", "mesh"), x)  # without a mesh, nothing is looked up
    mesh = MeshConfig(fsdp=2, tensor=2).build()
    with mesh.use():
        y = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh.jax_mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 4}, {"fsdp": 8}])
def test_no_large_array_of_the_paper_model_stays_whole(shape: dict[str, int]):
    """Each device holds only its share of each array above 1 MB of the 2.7B model and its optimizer state.

    The share is 1/(fsdp x tensor) where an array has both axes; the position and offset tables have only `embed`.
    """
    config = MeshConfig(**shape)
    model = TransformerConfig().build(60_032, 4096, 1024)
    optimizer = OptimizerConfig().build(1000)

    def build(key: jax.Array) -> TrainState:
        ids = jnp.zeros((1, 2), jnp.int32)
        params = model.init(key, ids, ids, ids, ids)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    boxed = jax.eval_shape(build, jax.random.key(0))
    abstract = config.build().abstract(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nn.unbox(boxed))] == [
        (leaf.shape, leaf.dtype) for _, leaf in leaves
    ]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert 2.6e9 < parameters < 2.8e9
    total = 0
    for path, leaf in leaves:
        held = np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
        total += held
        places = re.search("position_embedding|offset_embedding", jax.tree_util.keystr(path))
        parts = config.fsdp if places else config.fsdp * config.tensor
        if leaf.size * leaf.dtype.itemsize > 2**20 and not _is_vector(path):
            assert held * parts == leaf.size * leaf.dtype.itemsize, jax.tree_util.keystr(path)
    whole = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    assert total < 1.02 * whole / (config.fsdp * config.tensor)


def _is_vector(path: tuple) -> bool:
    """Biases and scales: 0.1% of the parameters, stacked over the layers; each is sharded by its one logical axis."""
    return any(name in jax.tree_util.keystr(path) for name in ("bias", "scale"))


def test_a_new_state_is_allocated_in_its_shardings():
    mesh = MeshConfig(fsdp=4, tensor=2).build()

    def init(key: jax.Array):
        make = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", "mlp"))
        return {"kernel": make(key, (8, 6), jnp.float32), "scale": jnp.ones(3)}

    state = new_state(init, optax.adam(1e-3), 0, mesh).create()
    expected = NamedSharding(mesh.jax_mesh, PartitionSpec("fsdp", "tensor"))
    for kernel in (state.params["kernel"], state.opt_state[0].mu["kernel"], state.opt_state[0].nu["kernel"]):
        assert isinstance(kernel, jax.Array)
        assert kernel.sharding.is_equivalent_to(expected, 2)
    assert state.params["scale"].sharding.is_fully_replicated
    assert int(state.step) == 0
    one = new_state(init, optax.adam(1e-3), 0, MeshConfig().build(jax.devices()[:1])).create()
    np.testing.assert_array_equal(
        one.params["kernel"], state.params["kernel"]
    )  # a function of the seed, not of the mesh


def test_one_process_feeds_all_rows():
    assert MeshConfig(fsdp=2, tensor=2).build().share(8) == (1, 0)


@pytest.mark.parametrize(
    ("held", "shares"),
    [
        # 2 processes x 4 devices, 8 rows. data=8:
        ({0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}, [(2, 0), (2, 1)]),
        # tensor=8: one group spans both, so both feed all rows.
        ({0: set(range(8)), 1: set(range(8))}, [(1, 0), (1, 0)]),
        # 4 processes x 2 devices, data=2, tensor=4: two processes to a group.
        ({0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}}, [(2, 0), (2, 0), (2, 1), (2, 1)]),
    ],
)
def test_processes_feed_the_rows_that_their_devices_hold(held: dict[int, set[int]], shares: list[tuple[int, int]]):
    rows = len(set.union(*held.values()))
    assert [share_of(held, rows, process) for process in held] == shares


@pytest.mark.parametrize(
    ("held", "odd"),
    [
        ({0: {0, 1}, 1: {1, 2}}, "process 1 hold 2 of the 3 rows of a batch, from row 1"),  # 2 x 3 devices, tensor=2
        ({0: {0, 1, 2, 3}, 1: {4, 5}}, "process 1 hold 2 of the 6 rows"),  # a host with fewer devices
        ({0: {0, 2}, 1: {1, 3}}, "process 0 hold 2 of the 4 rows of a batch, from row 0"),  # not consecutive
    ],
)
def test_a_mesh_that_equal_shares_cannot_feed_is_refused(held: dict[int, set[int]], odd: str):
    with pytest.raises(InputError, match=f"the devices of {odd}.*; make mesh.fsdp x mesh.tensor"):
        share_of(held, len(set.union(*held.values())), 0)


def test_rows_that_the_mesh_cannot_divide_are_refused():
    with pytest.raises(InputError, match=r"batch of 6 rows can't be divided over the 4 shards .*; use a multiple of 4"):
        MeshConfig(data=2, fsdp=2, tensor=2).build().share(6)


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        ({"num_heads": 2}, MeshConfig(tensor=4), "heads=2 of the model can't be divided by mesh.tensor=4"),
        ({"embed": 20}, MeshConfig(fsdp=8), "embed=20 of the model can't be divided by mesh.fsdp=8"),
        ({"mlp": 18}, MeshConfig(tensor=4), "mlp=18 of the model can't be divided by mesh.tensor=4"),
    ],
)
def test_sizes_that_the_mesh_cannot_divide_are_refused_before_anything_is_allocated(
    config: dict[str, int], mesh: MeshConfig, message: str
):
    sizes = {"num_layers": 1, "embed": 16, "num_heads": 4, "mlp": 16, **config}
    model = TransformerConfig(**sizes).build(128, 16, 4)
    ids = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(InputError, match=f"{message}; use a divisor of"):
        new_state(lambda key: model.init(key, ids, ids, ids, ids), OptimizerConfig().build(9), 0, mesh.build())


def test_a_vocabulary_that_the_mesh_cannot_divide_is_refused():
    boxed = {"table": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((129, 16), jnp.float32), ("vocab", "embed"))}
    with pytest.raises(InputError, match=r"vocab=129 of the model can't be divided by mesh.tensor=2"):
        MeshConfig(tensor=2).build().abstract(boxed)
