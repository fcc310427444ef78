"""How the 2.7B training step is sharded: shardings, bytes, products and collectives of the program that XLA makes.

    python benchmarks/sharding.py                  # writes benchmarks/results/sharding_cpu.json, in about 2 minutes
    python benchmarks/sharding.py --mesh 8/8/4     # prints one mesh, and writes nothing

The real step of `configs/ra_cm3_2_7b.py`, all 32 layers, is lowered and partitioned for 256 fake devices; nothing is
allocated or run. Collectives are read right after partitioning, where numbers still have the types of the model; loops
count as often as they run. A GPU's compiler merges small ones, and turns an all-reduce that is only sliced into a
reduce-scatter. XLA's temporary bytes on CPUs say nothing of a GPU's, so none are written.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import record

RESULTS = Path(__file__).parent / "results" / "sharding_cpu.json"
CONFIG = Path(__file__).parents[1] / "configs" / "ra_cm3_2_7b.py"
MESHES = ("1/256/1", "8/8/4", "64/1/4")  # data/fsdp/tensor
SMALL = 1_000_000  # bytes a step; collectives below are added up in one line
KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_dump_hlo_module_re=jit_guarded --xla_dump_hlo_pass_re=spmd-partitioning"
)


def collectives(hlo: str, mesh: dict[str, int]) -> list[dict[str, Any]]:
    """The collectives of a partitioned program, added up by kind, mesh axes and type.

    Args:
      mesh: sizes of the axes of devices 0, 1, 2, ..., the last axis fastest.

    Raises:
      ValueError: one is in a loop of which it is not known how often it runs.
    """
    computations = _computations(hlo)
    total: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])

    def visit(name: str, times: int | None) -> None:
        for line in computations[name]:
            if found := re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
                if times is None:
                    raise ValueError(f"a loop of unknown length has a collective: {line.strip()[:200]}")
                group = _group(line)
                if len(group) == 1:
                    continue  # nothing moves
                kind = _kind(found[2], line, computations[name])
                for dtype, size in _arrays(found[1]):
                    whole = size * (len(group) if found[2] == "reduce-scatter" else 1)
                    entry = total[kind, _axes(group, mesh), dtype]
                    entry[0] += times
                    entry[1] += times * whole
            if loop := re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", line):
                trips = _trips(computations[loop[1]])
                visit(loop[2], None if trips is None or times is None else times * trips)
            elif called := re.search(r"(?:to_apply|calls|branch_computations)=\{?([%\w., -]+)", line):
                for each in re.findall(r"%([\w.-]+)", called[1]):
                    visit(each, times)

    visit("ENTRY", 1)
    return _rows(total)


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by name."""
    lines: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            lines[name] = []
        elif name and line.startswith("  "):
            lines[name].append(line)
    return lines


def _trips(condition: list[str]) -> int | None:
    """How often a loop runs that counts from 0 to a constant."""
    root = next((line for line in condition if "ROOT" in line), "")
    if found := re.search(r"compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", root):
        for line in condition:
            if limit := re.search(rf"%{re.escape(found[1])} = s32\[\] constant\((\d+)\)", line):
                return int(limit[1])
    return None


def _kind(kind: str, line: str, computation: list[str]) -> str:
    """An all-reduce of which each device uses a slice is told from one that all use whole."""
    if kind != "all-reduce":
        return kind
    result = line.split(" = ")[0].replace("ROOT", "").strip()
    users = [each for each in computation if re.search(rf"[(, ]{re.escape(result)}[,)]", each.split(" = ", 1)[1])]
    return "all-reduce, sliced" if users and all(" dynamic-slice(" in each for each in users) else kind


def _arrays(types: str) -> Iterator[tuple[str, int]]:
    """Types and bytes of the arrays in a result."""
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
        yield dtype, ITEMSIZE[dtype] * math.prod(int(size) for size in shape.split(",") if size)


def _group(line: str) -> list[int]:
    """The devices of the first group of a collective."""
    if "source_target_pairs=" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line)
        return [int(each) for each in next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(each) for each in listed[1].split(",")]
    if named := re.search(r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(([^)]+\))?\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        grid = ids.reshape(tuple(sizes.values()))
        chosen = re.findall(r"'(\w+)'", named[3])
        first = grid[tuple(slice(None) if name in chosen else 0 for name in sizes)]
        return [int(each) for each in first.reshape(-1)]
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return [int(each) for each in _iota(tiled[3])[: int(tiled[2])]]
    raise ValueError(f"no replica groups are read in {line.strip()[:300]}")


def _iota(text: str) -> np.ndarray:
    """`[8,4]T(1,0)`: 0 to 31 in 8 rows of 4, transposed, in one row."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    if found is None:
        raise ValueError(f"{text} names no devices")
    shape = tuple(int(each) for each in found[1].split(","))
    ids = np.arange(math.prod(shape)).reshape(shape)
    if found[2]:
        ids = ids.transpose(tuple(int(each) for each in found[2].split(",")))
    return ids.reshape(-1)


def _axes(group: list[int], mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return " x ".join(name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)


def _rows(total: dict[tuple[str, str, str], list[int]]) -> list[dict[str, Any]]:
    rows, small = [], [0, 0]
    for (kind, axes, dtype), (count, size) in sorted(total.items()):
        if size < SMALL:
            small = [small[0] + count, small[1] + size]
        else:
            rows.append({"kind": kind, "axes": axes, "dtype": dtype, "count": count, "bytes": size})
    return [*rows, {"kind": "smaller ones", "axes": "", "dtype": "", "count": small[0], "bytes": small[1]}]


def square_arrays(hlo: str, lengths: tuple[int, ...]) -> list[str]:
    """Types of arrays with two axes of these lengths: what attention must not make."""
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", hlo))
    return sorted(shape for shape in shapes if sum(int(size) in lengths for size in shape.split(",")) > 1)


def products(stablehlo: str) -> dict[str, int]:
    """How many matrix products a lowered program has, by the types that they multiply and give."""
    types = r"dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>"
    found = Counter(f"{a} x {b} -> {out}" for a, b, out in re.findall(types, stablehlo))
    if found.total() != stablehlo.count("stablehlo.dot_general"):
        raise ValueError("the types of some matrix products are not read")
    return dict(sorted(found.items()))


def measure(mesh: str, layers: int | None, dump: Path) -> dict[str, Any]:
    """One mesh, in this process, whose fake devices were set before JAX started; XLA writes programs to `dump`."""
    from dataclasses import replace

    import jax

    from rac3.config import load_config_module

    data, fsdp, tensor = (int(size) for size in mesh.split("/"))
    experiment = load_config_module(str(CONFIG)).get_config()
    model = replace(experiment.model, num_layers=layers or experiment.model.num_layers, attention="blockwise")
    experiment = replace(experiment, model=model, mesh=replace(experiment.mesh, data=data, fsdp=fsdp, tensor=tensor))
    lowered, state = lower(experiment)
    compiled = lowered.compile()
    (path,) = dump.glob("*after_spmd-partitioning*")
    hlo = path.read_text(encoding="utf-8")
    sizes = dict(zip(("data", "fsdp", "tensor"), (data, fsdp, tensor), strict=True))
    lengths = experiment.batches.row, experiment.batches.context_length
    return {
        "microbatches": experiment.training.microbatches,
        "remat": model.remat,
        "layers": model.num_layers,
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "seq_by_seq_arrays": square_arrays(hlo, lengths) + square_arrays(compiled.as_text(), lengths),
        "products": products(lowered.as_text()),
        "parameters": {
            "/".join(key.key for key in path): [*leaf.shape, str(leaf.sharding.spec)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params["params"])
        },
        "collectives": collectives(hlo, sizes),
    }


def lower(experiment: Any) -> tuple[Any, Any]:
    """The training step of an experiment on this process's devices, lowered; and its abstract state."""
    import jax
    import jax.numpy as jnp

    from rac3.batches.packing import PackedBatch
    from rac3.plan.training import planned_model
    from rac3.run import initializer
    from rac3.training.state import new_state
    from rac3.training.step import make_train_step

    batches, training = experiment.batches, experiment.training
    mesh = experiment.mesh.build()
    model = planned_model(experiment, experiment.model.attention)
    optimizer = experiment.optimizer.build(training.steps)
    state = new_state(initializer(model), optimizer, experiment.seed, mesh).abstract
    shape, sharding = (batches.rows, batches.row), mesh.sharding("batch", None)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    batch = PackedBatch(ids, ids, ids, ids, ids, weights, ids)
    step: Any = make_train_step(model, optimizer, training.loss_chunk, training.microbatches)
    with mesh.use():
        return step.lower(state, batch), state


def run(mesh: str, layers: int | None = None) -> dict[str, Any]:
    """`measure` in its own process, with as many fake devices as the mesh has."""
    devices = math.prod(int(size) for size in mesh.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{FLAGS} --xla_force_host_platform_device_count={devices} --xla_dump_to={folder}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"}
        command = [sys.executable, __file__, "--mesh", mesh, "--dump", folder]
        command += ["--layers", str(layers)] if layers else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def text(results: dict[str, Any]) -> str:
    """As JSON, with a line for each array and each collective, so that a diff shows what changed."""

    def lines(value: Any, indent: str) -> str:
        inner = indent + "  "
        if isinstance(value, dict) and any(isinstance(each, dict | list) for each in value.values()):
            body = [f"{inner}{json.dumps(key)}: {lines(each, inner)}" for key, each in value.items()]
            return "{\n" + ",\n".join(body) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(each, dict) for each in value):
            return "[\n" + ",\n".join(inner + lines(each, inner) for each in value) + f"\n{indent}]"
        return json.dumps(value)

    return lines(results, "") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", choices=MESHES)
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quicker look")
    parser.add_argument("--dump", type=Path, help="measure in this process, which writes its programs there")
    arguments = parser.parse_args()
    if arguments.dump:
        print(json.dumps(measure(arguments.mesh, arguments.layers, arguments.dump)))
    elif arguments.mesh:
        print(text({arguments.mesh: run(arguments.mesh, arguments.layers)}))
    else:
        found = {mesh: run(mesh) for mesh in MESHES}
        recorded = json.loads(record("benchmarks/sharding.py", ("jax", "jaxlib", "flax"), found))
        RESULTS.write_text(text(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
