"""The arithmetic of a training: by hand, against what JAX keeps, and against the programs that XLA makes."""

import importlib
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

from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, load_config_module
from rac3.devices.cluster import Cluster
from rac3.devices.mesh import MeshConfig
from rac3.experiment import Experiment
from rac3.model.cudnn import slot_sizes
from rac3.model.transformer import TransformerConfig
from rac3.plan.table import amount, duration
from rac3.plan.training import Collective, Remat, Setting, TrainingPlan, growth, planned_model, training_plan
from rac3.run import Run, initializer
from rac3.training.state import new_state

ROOT = Path(__file__).parents[2]
PAPER = load_config_module(str(ROOT / "configs" / "ra_cm3_2_7b.py")).get_config()
GOLDEN = json.loads((ROOT / "benchmarks" / "results" / "sharding_cpu.json").read_text())["results"]
MESHES = {"1/256/1": (1, 256, 1), "8/8/4": (8, 8, 4), "64/1/4": (64, 1, 4)}


@pytest.fixture(scope="module")
def sharding() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("sharding")


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
    kept = saved_residuals(lambda params, x: model.apply(params, x, x, x, x), params, ids)
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
    over 4 holds a quarter of everything. `dots` keeps the input and the stream between, 2 x 2 x 2560 bytes a token;
    query, key, value and output, 4 x 2 x 2560, with 32 sums of float32; the MLP, 2 x 10240."""
    experiment = replace(
        PAPER,
        batches=replace(PAPER.batches, row_length=4096, rows=128),
        model=replace(PAPER.model, num_layers=1, attention="blockwise"),
    )
    plan = TrainingPlan(experiment)
    split = 4 * 2 * 2560 + 4 * 32 + 2 * 10_240
    setting = Setting(16, 4, 4, 2, "dots")
    assert plan.estimate(setting).memory["kept activations"] == 4096 * (2 * 2 * 2560 / 4 + split / 4)
    assert plan.estimate(replace(setting, remat="full")).memory["kept activations"] == 4096 * 2 * 2560 / 4
    whole = replace(setting, data=64, fsdp=4, tensor=1, microbatches=1, remat="full")
    with pytest.raises(InputError, match=r"rows=128 can't be divided by .*=256; use a multiple"):
        plan.estimate(whole)


@pytest.mark.parametrize(("mesh", "most"), [((8, 8, 4), 70e9), ((64, 1, 4), 70e9), ((32, 8, 1), 70e9)])
def test_the_papers_batch_fits_its_gpus(mesh: tuple[int, int, int], most: float, paper: TrainingPlan):
    estimate = paper.estimate(Setting(*mesh, PAPER.training.microbatches, PAPER.model.remat))
    assert estimate.bytes < most
    assert paper.fits(estimate)
    assert not paper.fits(paper.estimate(Setting(*mesh, 1, "none")))  # and not without these two


# FLOPs.

GROUPS = (1061, 2122, 3183)  # tokens of one to three documents of the paper


def test_flops_of_a_token_by_hand(paper: TrainingPlan):
    """Documents have 1024 + 32 + 5 tokens. Per token 6 for each weight of a product; attention takes
    12 x width a layer for each pair of tokens, n (n + 1) / 2 of them in a group of n."""
    weights = 32 * (4 * 2560**2 + 2 * 2560 * 10_240) + 2560 * paper.model.vocab_size
    causal = sum(n * (n + 1) / 2 for n in GROUPS) / sum(GROUPS)
    full = sum(n * n for n in GROUPS) / sum(GROUPS)
    expected = [6 * weights + 12 * 32 * 2560 * pairs for pairs in (full, causal)]
    assert paper.flops_per_token == pytest.approx(expected, rel=1e-6)


def test_flops_of_recomputation_are_those_of_the_program():
    """XLA counts the products of a program; those of a scan over one layer count once."""
    config = TransformerConfig(num_layers=1, embed=256, num_heads=4, mlp=1024, dtype="float32", attention="plain")
    rows, seq = 1, 128
    plan = TrainingPlan(replace(PAPER, model=config))

    def counted(remat: Remat) -> float:
        model = replace(config, remat=remat).build(128, seq, 16)
        params = nn.unbox(jax.eval_shape(initializer(model), jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((rows, seq), jnp.int32)
        loss = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply(params, x, x, x, x))))
        return loss.lower(params, ids).compile().cost_analysis()["flops"]

    products, attention = 2.0 * (4 * 256**2 + 256 * 1024), 4.0 * seq * 256  # the plain form counts all pairs
    assert counted("full") - counted("none") == pytest.approx(rows * seq * (products + attention), rel=0.02)

    def planned(remat: Remat) -> float:
        return plan.executed_flops(remat) / plan.tokens

    causal = sum(n * (n + 1) / 2 for n in GROUPS) / sum(GROUPS)
    assert planned("none") == planned("dots") == plan.flops_per_token[1]
    assert planned("attention") - planned("none") == pytest.approx(products)
    assert planned("full") - planned("attention") == pytest.approx(4 * 256 * causal, rel=1e-4)


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
    """To 1%: kernels, tables and their gradients, activations across tensor."""
    setting = Setting(*MESHES[mesh], PAPER.training.microbatches, PAPER.model.remat)
    program, planned = golden(mesh), defaultdict[tuple[str, str], float](float)
    for each in paper.estimate(setting).collectives:
        axes = " x ".join(axis for axis in each.axes if getattr(setting, axis) > 1)
        planned[each.kind, axes] += each.size * each.count
    assert set(planned) <= set(program)
    for each, size in program.items():
        # What is not planned: biases, norms, and sums of the loss, below a thousandth of what moves.
        assert planned[each] == pytest.approx(size, rel=0.01, abs=1e-3 * sum(program.values())), each


@pytest.mark.parametrize("mesh", MESHES)
def test_arguments_of_the_program_are_the_planned_state_and_the_batch(mesh: str, paper: TrainingPlan):
    data, fsdp, tensor = MESHES[mesh]
    batch = 7 * 4 * PAPER.batches.rows * PAPER.batches.row // (data * fsdp)
    assert GOLDEN[mesh]["argument_bytes"] == sum(paper.state_bytes((data, fsdp, tensor))) + batch + 2 * 4


@pytest.mark.parametrize("mesh", MESHES)
def test_no_array_of_the_program_is_seq_by_seq(mesh: str):
    assert GOLDEN[mesh]["seq_by_seq_arrays"] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_all_products_of_the_program_are_of_bfloat16(mesh: str):
    """Operands, forward and backward; results may be the float32 sums that they are made of."""
    assert {types.partition(" -> ")[0] for types in GOLDEN[mesh]["products"]} == {"bf16 x bf16"}


def test_products_are_counted_by_type(sharding: ModuleType):
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))
    program = jax.jit(lambda x, y: (x @ x.T, (x @ y, x @ y), (x @ x.T) @ x)).lower(x, y).as_text()
    assert sharding.products(program) == {"bf16 x bf16 -> bf16": 3, "f32 x f32 -> f32": 2}
    with pytest.raises(ValueError, match="types of some matrix products are not read"):
        sharding.products(program + "stablehlo.dot_general of another form")


PARTITIONED = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[8,512]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %reduced = f32[1000]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, to_apply=%add
  %sliced = f32[1000]{0} all-reduce(%z), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %part = f32[250]{0} dynamic-slice(%sliced, %i), dynamic_slice_sizes={250}
  ROOT %t = (s32[], f32[8]) tuple(%reduced, %part)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %loop = (s32[], f32[8]) while(%p), condition=%inner_condition, body=%inner_body
  %scattered = f32[10]{0} reduce-scatter(%w), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%loop, %scattered)
}

%outer_condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%p), condition=%outer_condition, body=%outer_body
  %alone = f32[7]{0} all-reduce(%v), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %moved = f32[8]{0} collective-permute(%u), source_target_pairs={{0,0},{0,1},{2,3}}
}
"""


def test_collectives_count_as_often_as_their_loops_run(sharding: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """A loop of 3 in a loop of 5, on a mesh of data 2 x fsdp 2 x tensor 2; the group of one device moves nothing."""
    monkeypatch.setattr(sharding, "SMALL", 0)
    rows = sharding.collectives(PARTITIONED, {"data": 2, "fsdp": 2, "tensor": 2})
    assert [tuple(row.values()) for row in rows] == [
        ("all-gather", "tensor", "bf16", 15, 15 * 8 * 512 * 2),
        ("all-reduce", "data x fsdp", "f32", 15, 15 * 4000),
        ("all-reduce, sliced", "data x fsdp", "f32", 15, 15 * 4000),
        ("collective-permute", "tensor", "f32", 1, 32),
        ("reduce-scatter", "data", "f32", 5, 5 * 40 * 2),
        ("smaller ones", "", "", 0, 0),
    ]
    monkeypatch.setattr(sharding, "SMALL", 1000)
    assert sharding.collectives(PARTITIONED, {"data": 2, "fsdp": 2, "tensor": 2})[-1]["count"] == 6


def test_a_collective_in_a_loop_of_unknown_length_is_refused(sharding: ModuleType):
    with pytest.raises(ValueError, match="a loop of unknown length has a collective"):
        sharding.collectives(PARTITIONED.replace("constant(3)", "parameter(3)"), {"data": 2, "fsdp": 2, "tensor": 2})


def test_square_arrays_are_found(sharding: ModuleType):
    hlo = "f32[4096,2560] bf16[1,16384,16384] f32[8,4096,80] f32[4096,4096]{1,0} pred[16384,4096]"
    assert sharding.square_arrays(hlo, (16_384, 4096)) == ["1,16384,16384", "16384,4096", "4096,4096"]


@pytest.mark.slow  # 15 s of CPU and 40 s of a busy machine for each
@pytest.mark.parametrize("mesh", MESHES)
def test_the_golden_table_is_that_of_the_program(mesh: str, sharding: ModuleType):
    """After a change that is meant, `python benchmarks/sharding.py` writes it again."""
    assert sharding.run(mesh) == GOLDEN[mesh]


def test_the_golden_table_is_of_this_config():
    for table in GOLDEN.values():
        assert table["remat"] == PAPER.model.remat
        assert table["microbatches"] == PAPER.training.microbatches
        assert table["layers"] == PAPER.model.num_layers


# The plan.


def printed(experiment: Experiment) -> str:
    return training_plan(Run(experiment, Workdir(Path("unused"), experiment.name)))


def test_a_plan_that_fits_says_so(capsys: pytest.CaptureFixture[str]):
    text = printed(PAPER)
    assert "2.68B parameters on 256 GPUs, 1,024 rows of 16,384 tokens a step" in text
    assert "32/8/1            4             dots" in text
    assert "this one" in text
    assert "30,720 GPU hours" in text
    assert capsys.readouterr().out == ""


def test_a_plan_that_does_not_fit_names_one_that_does(capsys: pytest.CaptureFixture[str]):
    """What it names is one command away, and fits."""
    large = replace(
        PAPER,
        training=replace(PAPER.training, microbatches=1),
        model=replace(PAPER.model, remat="none"),
        batches=replace(PAPER.batches, rows=16),
        cluster=replace(PAPER.cluster, hosts=1),
    )
    with pytest.raises(
        InputError, match=r"train: \d+ GB of each device's memory, of which 90% of 80 GB .*; use --mesh"
    ) as error:
        printed(large)
    assert "kept activations" in capsys.readouterr().out
    words = str(error.value).split("use ")[-1].split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    setting = Setting(
        *(int(options[f"--mesh.{axis}"]) for axis in ("data", "fsdp", "tensor")),
        int(options["--training.microbatches"]),
        options["--model.remat"],
    )
    plan = TrainingPlan(large)
    assert plan.fits(plan.estimate(setting))
    huge = replace(large, cluster=replace(large.cluster, gpu_memory_gb=1.0))
    with pytest.raises(InputError, match="no mesh of these devices fits: use more devices"):
        printed(huge)


def test_the_best_setting_is_the_fastest_of_those_that_fit():
    """Against a search over all of them, on few devices."""
    few = replace(PAPER, cluster=replace(PAPER.cluster, hosts=1), batches=replace(PAPER.batches, rows=16))
    plan = TrainingPlan(few)
    best = plan.best()
    assert best is not None
    all_of_them = [each for setting in plan._settings() if (each := plan._tried(setting))]
    assert {(each.setting.data, each.setting.tensor) for each in all_of_them} == {
        (8, 1),
        (4, 1),
        (2, 1),
        (1, 1),
        (4, 2),
        (2, 2),
        (1, 2),
        (2, 4),
        (1, 4),
        (1, 8),
    }
    assert best.seconds == min(each.seconds for each in all_of_them if each.bytes <= 0.9 * 80e9)


def test_neighbors_differ_in_one_size(paper: TrainingPlan):
    setting = Setting(8, 8, 4, 4, "dots")
    found = {each.setting for each in paper.neighbors(setting)}
    assert found == {
        setting,
        *(replace(setting, remat=remat) for remat in ("none", "attention", "full")),
        Setting(16, 8, 2, 4, "dots"),
        Setting(4, 8, 8, 4, "dots"),
        Setting(16, 4, 4, 4, "dots"),
        Setting(4, 16, 4, 4, "dots"),
        Setting(8, 8, 4, 2, "dots"),
        Setting(8, 8, 4, 8, "dots"),
    }


def test_a_step_takes_its_products_and_the_messages_that_do_not_pass_meanwhile():
    """Seconds by hand: FLOPs over 40% of 256 x 312 TFLOP/s; across tensor 300 GB/s; on a slow network the rest."""
    plan = TrainingPlan(PAPER)
    estimate = plan.estimate(Setting(8, 8, 4, 4, "dots"))
    compute = estimate.flops / (256 * 312e12 * 0.4)
    tensor = sum(each.sent(estimate.setting) for each in estimate.collectives if each.axes == ("tensor",)) / 300e9
    assert estimate.seconds == pytest.approx(compute + tensor)
    slow = TrainingPlan(replace(PAPER, cluster=replace(PAPER.cluster, network_gb_per_second=0.1)))
    others = sum(each.sent(estimate.setting) for each in estimate.collectives if each.axes != ("tensor",)) / 0.1e9
    assert slow.estimate(Setting(8, 8, 4, 4, "dots")).seconds == pytest.approx(tensor + others)


def test_indivisible_meshes_are_refused():
    for mesh, message in (
        (MeshConfig(fsdp=3), "does not fit the 256 devices"),
        (MeshConfig(fsdp=1, tensor=64), r"heads=32 of the model can't be divided by mesh\.tensor=64"),
    ):
        with pytest.raises(InputError, match=message):
            printed(replace(PAPER, mesh=mesh, training=replace(PAPER.training, microbatches=1)))


def test_the_plan_in_the_docs_is_the_one_that_is_printed():
    text = (ROOT / "docs" / "cluster.md").read_text()
    for line in printed(PAPER).splitlines():
        assert not line or f"    {line}\n" in text, line


@pytest.mark.parametrize("size", ["125m", "350m", "1_3b", "2_7b", "7b"])
def test_a_config_says_what_its_plan_says(size: str):
    module = load_config_module(str(ROOT / "configs" / f"ra_cm3_{size}.py"))
    experiment = module.get_config()
    plan = TrainingPlan(experiment)
    estimate = plan.estimate(plan.chosen())
    days = estimate.seconds * experiment.training.steps / 86_400
    figures = f"use {amount(estimate.bytes)} each, and take {duration(estimate.seconds)} a step and {days:.3g} days"
    assert f"256 A100s of 80 GB {figures} in all" in " ".join(module.__doc__.split())


def test_the_growth_in_the_docs_is_the_planned_one():
    table = (ROOT / "docs" / "cluster.md").read_text().split("| GPUs |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [int(row[0].replace(",", "")) for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for row in (rows[0], rows[-1]):
        (estimate,) = growth(PAPER, [int(row[0].replace(",", ""))])
        setting = estimate.setting
        assert row[1:3] == [f"{setting.data}/{setting.fsdp}/{setting.tensor}", str(setting.microbatches)]
        assert row[4] == amount(estimate.bytes)
        assert row[5] == duration(estimate.seconds)
