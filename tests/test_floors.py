"""The ladder of imports: a module imports from lower floors, or from earlier modules of its own package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rac3"

FLOORS = (
    ("config",),
    ("artifacts", "weights", "devices"),
    ("execution",),
    ("documents", "tokens"),
    ("vqgan", "clip", "retrieval", "batches"),
    ("model",),
    ("training", "generation"),
    ("evaluation",),
    ("experiment",),
    ("recipes", "run", "prompt", "ranking", "answering", "held_out", "experiment_file"),
    ("stages",),
    ("plan", "report", "demo"),
    ("cli",),
    ("__main__",),
)
# Not even from a lower floor: (importer, imported, why).
FORBIDDEN = (
    ("training", "retrieval", "the two meet at the neighbors artifact"),
    ("generation", "training", "it depends on parameters, not on how they were trained"),
    ("evaluation", "training", "it depends on parameters, not on how they were trained"),
    ("stages.fit", "experiment", "a fit takes what it uses"),
)
# The order inside a package. Modules that are not listed come after the listed ones, in any order without a cycle.
ORDER = {
    "": ("recipes", "run", "prompt", "ranking", "answering", "held_out", "experiment_file"),
    "artifacts": ("recipe", "files", "workdir", "arrays"),
    "weights": (
        "fitting",
        "checkpoint_files",
        "settings",
        "torch_file",
        "params_file",
        "weights_file",
        "port",
    ),
    "execution": ("progress", "shards"),
    "documents": ("document", "filter", "tar", "shard_table", "webdataset", "tfds", "world", "reader", "store"),
    "tokens": ("vocabulary", "text", "html"),
    "vqgan": (
        "model",
        "discriminator",
        "perceptual",
        "objective",
        "codec",
        "checkpoint",
        "frozen",
        "files",
        "family",
        "families",
        "published",
    ),
    "clip": (
        "model",
        "contrastive",
        "siglip",
        "images",
        "efficientnet",
        "linear",
        "encoder",
        "checkpoint",
        "frozen",
        "family",
        "families",
        "published",
    ),
    "retrieval": ("memory", "retriever", "selection", "open_memory", "scann", "exact", "faiss", "fixed", "baselines"),
    "batches": ("draws", "masking", "packing", "groups", "loader"),
    "model": (
        "blockwise",
        "cudnn",
        "splash",
        "packed",
        "product",
        "rotary",
        "embedding",
        "attention",
        "transformer",
        "decoder",
        "losses",
        "exchange",
    ),
    "training": (
        "optimizer",
        "flops",
        "state",
        "step",
        "checksum",
        "checkpoint",
        "metrics",
        "preemption",
        "profile",
        "loop",
    ),
    "generation": (
        "request",
        "step",
        "copying",
        "sampling",
        "grammar",
        "batch",
        "engine",
        "prompts",
        "answers",
        "rerank",
        "tasks",
    ),
    "demo": ("form", "look", "page"),
    "report": ("table", "plots", "page", "samples"),
}


# Everything else takes the parts of an experiment that it uses.
TAKE_AN_EXPERIMENT = ("recipes", "run", "held_out", "experiment_file", "stages", "plan", "report", "cli")


def modules() -> list[tuple[str, ...]]:
    """Every module by its path below `rac3`: ("batches", "masking")."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return sorted(path.parts for path in paths if path.name != "__init__")


def imports(module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The modules of rac3 that `module` imports, at the top or inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse((PACKAGE.joinpath(*module).with_suffix(".py")).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    known = set(modules())
    for name in names:
        parts = tuple(name.split("."))
        if parts[0] == "rac3" and parts != ("rac3", "__version__"):
            inside = next((parts[1:end] for end in range(len(parts), 1, -1) if parts[1:end] in known), None)
            assert inside, f"{module} imports {name}, which is no module of rac3"
            yield inside


def floor(module: tuple[str, ...]) -> int:
    return next(number for number, names in enumerate(FLOORS) if module[0] in names)


def place(module: tuple[str, ...]) -> int:
    package, name = ("", module[0]) if len(module) == 1 else module[:2]
    order = ORDER.get(package, ())
    return order.index(name) if name in order else len(order)


def violation(module: tuple[str, ...], imported: tuple[str, ...]) -> str | None:
    text = f"{'.'.join(module)} imports {'.'.join(imported)}"
    for importer, forbidden, why in FORBIDDEN:
        if ".".join(module).startswith(importer + ".") and imported[0] == forbidden:
            return f"{text}: {why}"
    if imported == ("experiment",) and module[0] not in TAKE_AN_EXPERIMENT:
        return f"{text}: workers take what they use"
    if module[0] == imported[0] == "stages" and imported[1] != "fit":
        return f"{text}: a stage reads what another has written through the run"
    if floor(imported) > floor(module):
        return f"{text}, which is on a higher floor"
    if floor(imported) < floor(module):
        return None
    if module[0] != imported[0]:
        names = ORDER[""]
        if module[0] in names and imported[0] in names:
            return None if names.index(imported[0]) < names.index(module[0]) else f"{text}, which comes later"
        return f"{text}, another package of the same floor"
    if len(module) > 2 and module[:2] == imported[:2]:  # in one subpackage
        return None
    later = place(imported) > place(module) or (place(imported) == place(module) < len(ORDER.get(module[0], ())))
    return f"{text}, which comes later in its package" if later else None


def test_every_module_has_a_floor():
    known = {name for names in FLOORS for name in names}
    assert {module[0] for module in modules()} - {"configs"} <= known


def test_floors():
    found = [violation(module, imported) for module in modules() for imported in imports(module)]
    assert [text for text in found if text] == []


def test_no_import_goes_round_in_a_circle():
    graph = {module: set(imports(module)) for module in modules()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        (("training", "loop"), ("retrieval", "exact")),
        (("evaluation", "perplexity"), ("training", "step")),
        (("generation", "decode"), ("training", "state")),
        (("stages", "fit", "clip"), ("experiment",)),
        (("execution", "shards"), ("documents", "document")),
        (("batches", "loader"), ("retrieval", "exact")),
        (("batches", "draws"), ("batches", "loader")),
        (("documents", "world"), ("tokens", "html")),
        (("config",), ("artifacts",)),
        (("recipes",), ("run",)),
        (("run",), ("stages", "train")),
        (("stages", "evaluate"), ("stages", "retrieve")),
        (("generation", "generator"), ("experiment",)),
        (("retrieval", "exact"), ("clip", "encoder")),
        (("experiment",), ("report",)),
        (("evaluation", "settings"), ("experiment",)),
    ],
)
def test_the_rules_find_what_they_forbid(module: tuple[str, ...], imported: tuple[str, ...]):
    assert violation(module, imported)


def test_nothing_imports_from_outside_the_package():
    for module in modules():
        source = PACKAGE.joinpath(*module).with_suffix(".py").read_text()
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"configs", "tests", "benchmarks", "launch", "pickle"}


def test_reading_a_config_loads_nothing_heavy():
    """Whichever retriever it uses."""
    heavy = ("scann", "torch", "ray", "tensorflow", "tensorflow_datasets", "transformers", "grain", "faiss")
    code = f"import sys, rac3.experiment; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
