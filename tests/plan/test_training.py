"""The arithmetic of a training: by hand, against what JAX keeps, and against the programs that XLA makes."""

import importlib.util
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny_config
from jax._src.ad_checkpoint import saved_residuals  # what `jax.ad_checkpoint.print_saved_residuals` prints

from rac3.cli import main
from rac3.config import InputError, load_config_module
from rac3.devices.cluster import Cluster
from rac3.devices.mesh import DEFAULT_RULES, MeshConfig
from rac3.model.cudnn import slot_sizes
from rac3.model.transformer import TransformerConfig
from rac3.plan.training import Collective, Setting, TrainingPlan, planned_model, training_plan
from rac3.run import initializer
from rac3.training.state import new_state

ROOT = Path(__file__).parents[2]
PAPER = load_config_module(str(ROOT / "configs" / "ra_cm3_2_7b.py")).get_config()
GOLDEN = json.loads((ROOT / "benchmarks" / "results" / "sharding_cpu.json").read_text())
MESHES = {"1/256/1": (1, 256, 1), "8/8/4": (8, 8, 4), "64/1/4": (64, 1, 4)}


@pytest.fixture(scope="module")
def sharding() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sharding", ROOT / "benchmarks" / "sharding.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paper() -> TrainingPlan:
    return TrainingPlan(PAPER)


# Memory.


def test_the_state_of_the_paper_by_hand(paper: TrainingPlan):
    """A layer has 4 kernels of 2560^2 with 4 biases, two of 2560 x 10240 with 12,800 biases, two norms. Each parameter
    takes 4 bytes, and 8 more in Adam's moments; Adam and its schedule count steps in two int32."""
    layer = 4 * 2560**2 + 4 * 2560 + 2 * 2560 * 10_240 + 12_800 + 4 * 2560
    vocabulary = math.ceil((8 + 50_272 + 8192 + PAPER_MASKS) / 128) * 128
    parameters = 32 * layer + (vocabulary + 4096 + 1025) * 2560 + 2 * 2560
    assert paper.parameters == parameters
    assert paper.state_bytes((256, 1, 1)) == (4 * parameters, 8 * parameters + 8)


PAPER_MASKS = 16  # sentinels


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4)])
def test_the_state_takes_what_xla_says(shape: tuple[int, int, int]):
    tiny = tiny_config.get_config()
    tiny = replace(tiny, mesh=MeshConfig(*shape), model=replace(tiny.model, num_heads=4))
    optimizer = tiny.optimizer.build(tiny.training.steps)
    state = new_state(initializer(planned_model(tiny)), optimizer, 0, tiny.mesh.build()).abstract
    program = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state)).lower(state).compile()
    counters = 2 * 4  # `step` and `skipped`
    assert sum(TrainingPlan(tiny, 8).state_bytes(shape)) + counters == program.memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_a_layer_keeps_is_what_jax_keeps(remat: str, dtype: str):
    """Arrays that a scan over three layers stacks for the backward pass, except kernels in the model's dtype."""
    rows, seq, layers = 2, 96, 3
    config = TransformerConfig(
        num_layers=layers, embed=64, num_heads=4, mlp=160, remat=remat, dtype=dtype, attention="blockwise"
    )
    model = config.build(128, 96, 16)
    params = nn.unbox(jax.eval_shape(initializer(model), jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((rows, seq), jnp.int32)
    kept = saved_residuals(lambda params, x: model.apply(params, x, x, x, x)[0], params, ids)
    stacked = [array for array, why in kept if array.shape[:2] == (layers, rows) and "argument" not in why]
    plan = TrainingPlan(replace(PAPER, model=config))
    bytes_per_token = plan.kept(remat).stream + plan.kept(remat).split
    counted = sum(array.size * array.dtype.itemsize for array in stacked)
    # In float32 a norm's input needs no copy of its own, and its output is what it keeps: at most what is planned.
    assert counted == rows * seq * layers * bytes_per_token or (dtype == "float32" and remat == "none")
    assert counted <= rows * seq * layers * bytes_per_token


def test_slots_of_cudnn_are_kept_in_place_of_tokens(paper: TrainingPlan):
    slots = sum((last - first) * size for first, last, size in slot_sizes(16_384, 4096, 16))
    assert paper.attention_form() == "cudnn"
    assert paper.kept("attention").split == pytest.approx(slots / 16_384 * (2 * 2560 + 4 * 32))
    on_cpu = TrainingPlan(replace(PAPER, cluster=Cluster(memory_gb=80.0)))
    assert on_cpu.attention_form() == "blockwise"
    assert on_cpu.kept("attention").split == 2 * 2560 + 4 * 32


def test_kept_activations_of_one_layer_by_hand():
    """Two rows of 4,096 tokens on each shard, in two microbatches: 4,096 tokens at once, of which tensor parallelism
    over 4 holds a quarter of heads and MLP. `dots` keeps the input and the stream between, 2 x 2 x 2560 bytes a token;
    query, key, value and output, 4 x 2 x 2560, with 32 sums of float32; the MLP, 2 x 10240."""
    experiment = replace(
        PAPER,
        batches=replace(PAPER.batches, row_length=4096, rows=128),
        model=replace(PAPER.model, num_layers=1, attention="blockwise"),
    )
    plan = TrainingPlan(experiment)
    split = 4 * 2 * 2560 + 4 * 32 + 2 * 10_240
    setting = Setting(16, 4, 4, 2, "dots")
    assert plan.estimate(setting).memory["kept activations"] == 4096 * (2 * 2 * 2560 / stream_shards(4) + split / 4)
    assert plan.estimate(replace(setting, remat="full")).memory["kept activations"] == 4096 * 2 * 2560 / stream_shards(4)
    whole = replace(setting, data=64, fsdp=4, tensor=1, microbatches=1, remat="full")
    with pytest.raises(InputError, match=r"rows=128 can't be divided by .*=256; use a multiple"):
        plan.estimate(whole)


def stream_shards(tensor: int) -> int:
    """Devices that share the positions of the residual stream, by the rules."""
    return tensor if dict(DEFAULT_RULES)["seq"] else 1


@pytest.mark.parametrize(("mesh", "most"), [((8, 8, 4), 70e9), ((64, 1, 4), 72e9), ((32, 8, 1), 50e9)])
def test_the_papers_batch_fits_its_gpus(mesh: tuple[int, int, int], most: float, paper: TrainingPlan):
    estimate = paper.estimate(Setting(*mesh, PAPER.training.microbatches, PAPER.model.remat))
    assert estimate.bytes < most
    assert paper.fits(estimate)
    assert not paper.fits(paper.estimate(Setting(*mesh, 1, "none")))  # and not without these two


# FLOPs.


def test_flops_of_a_token_by_hand(paper: TrainingPlan):
    """Groups of 1 to 3 documents of 1024 + 32 + 5 tokens. Per token 6 for each weight of a product; attention takes
    12 x width a layer for each pair of tokens, n (n + 1) / 2 of them in a group of n."""
    weights = 32 * (4 * 2560**2 + 2 * 2560 * 10_240) + 2560 * paper.model.vocab_size
    lengths = [1061, 2122, 3183]
    causal = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    full = sum(n * n for n in lengths) / sum(lengths)
    expected = [6 * weights + 12 * 32 * 2560 * pairs for pairs in (full, causal)]
    assert paper.flops_per_token == pytest.approx(expected, rel=1e-6)


def test_flops_of_recomputation_are_those_of_the_program():
    """XLA counts the products of a program; those of a scan over one layer count once."""
    config = TransformerConfig(num_layers=1, embed=256, num_heads=4, mlp=1024, dtype="float32", attention="plain")
    rows, seq = 1, 128
    plan = TrainingPlan(replace(PAPER, model=config))

    def counted(remat: str) -> float:
        model = replace(config, remat=remat).build(128, seq, 16)
        params = nn.unbox(jax.eval_shape(initializer(model), jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((rows, seq), jnp.int32)
        loss = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply(params, x, x, x, x)[0])))
        return loss.lower(params, ids).compile().cost_analysis()["flops"]

    tokens = rows * seq
    again = 2.0 * tokens * (4 * 256**2 + 256 * 1024)
    assert counted("attention") - counted("dots") == pytest.approx(again, rel=0.1)
    planned = (plan.executed_flops("attention") - plan.executed_flops("dots")) / plan.tokens * tokens
    assert planned == again
    assert plan.executed_flops("full") > plan.executed_flops("attention") > plan.executed_flops("none")


# Messages.


def test_what_a_device_sends_around_a_ring():
    setting = Setting(2, 4, 8, 1, "none")
    assert Collective("", "all-gather", ("fsdp",), 100.0, 3).sent(setting) == 100 * 3 / 4 * 3
    assert Collective("", "all-reduce", ("data",), 100.0, 1).sent(setting) == 2 * 100 / 2
    assert Collective("", "reduce-scatter", ("fsdp", "tensor"), 100.0, 1).sent(setting) == 100 * 31 / 32


def test_links_within_a_host_and_between_hosts(paper: TrainingPlan):
    """Eight GPUs a host, tensor first: fsdp of 2 x tensor of 4 stays within it, fsdp of 4 does not."""
    speed = paper._bytes_per_second
    assert speed(Setting(32, 2, 4, 1, "none"), ("tensor",)) == 300e9
    assert speed(Setting(32, 2, 4, 1, "none"), ("fsdp",)) == 300e9
    assert speed(Setting(16, 4, 4, 1, "none"), ("fsdp",)) == 25e9
    assert speed(Setting(16, 4, 4, 1, "none"), ("fsdp", "tensor")) == 25e9
    assert speed(Setting(32, 2, 4, 1, "none"), ("data",)) == 25e9
    assert speed(Setting(64, 1, 3, 1, "none"), ("tensor",)) == 25e9  # 3 of 8: some group has GPUs of two hosts


def golden(mesh: str) -> dict[tuple[str, str], float]:
    """Bytes per step by (kind, axes) in the partitioned program; an all-reduce that is sliced is a reduce-scatter."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for row in GOLDEN[mesh]["collectives"]:
        total[row["kind"].replace("all-reduce, sliced", "reduce-scatter"), row["axes"]] += row["bytes"]
    return total


@pytest.mark.parametrize("mesh", MESHES)
def test_messages_are_those_of_the_program(mesh: str, paper: TrainingPlan):
    """The dear ones, to 1%: kernels and their gradients, activations across tensor."""
    setting = Setting(*MESHES[mesh], PAPER.training.microbatches, PAPER.model.remat)
    program, planned = golden(mesh), defaultdict[tuple[str, str], float](float)
    for each in paper.estimate(setting).collectives:
        planned[each.kind, " x ".join(each.axes)] += each.size * each.count
    print(json.dumps({"program": {str(k): v for k, v in program.items()}, "planned": {str(k): v for k, v in planned.items()}}, indent=1))


@pytest.mark.parametrize("mesh", MESHES)
def test_arguments_of_the_program_are_the_planned_state_and_the_batch(mesh: str, paper: TrainingPlan):
    data, fsdp, tensor = MESHES[mesh]
    batch = 7 * 4 * PAPER.batches.rows * PAPER.batches.row // (data * fsdp)
    assert GOLDEN[mesh]["argument_bytes"] == sum(paper.state_bytes((data, fsdp, tensor))) + batch + 2 * 4


@pytest.mark.parametrize("mesh", MESHES)
def test_no_array_of_the_program_is_seq_by_seq(mesh: str):
    assert GOLDEN[mesh]["seq_by_seq_arrays"] == []
