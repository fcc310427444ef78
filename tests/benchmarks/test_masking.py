"""The comparison of maskings: what each variant changes, and the table of figures made by hand."""

from pathlib import Path
from types import ModuleType

from rac3.config import canonical

TINY = Path(__file__).parents[1] / "tiny_config.py"


def test_each_variant_changes_the_masking_alone(masking: ModuleType, variants: ModuleType, tmp_path: Path):
    config = variants.seeded(str(TINY), 0, tmp_path)
    found = {name: variants.open_variant(config, [], each)[1].experiment for name, each in masking.VARIANTS.items()}
    shown = {name: canonical(each) for name, each in found.items()}
    drawn = {name: each["batches"].pop("masking") for name, each in shown.items()}
    assert shown["config"] == shown["ra_cm3"] == shown["metaseq"]
    assert {name: (each["preset"], each["whole_segments"]) for name, each in drawn.items()} == {
        "config": ("ra_cm3", 0.8),
        "ra_cm3": ("ra_cm3", 0.0),
        "metaseq": ("metaseq", 0.0),
    }


def test_accuracies_are_of_the_test_split_by_seed(masking: ModuleType):
    def figures(value: float) -> dict:
        return {"accuracy": {"validation": {"joint_accuracy": 1.0}, "test": {"joint_accuracy": value, "other": None}}}

    seeds = {
        "0": {"config": figures(0.25), "ra_cm3": figures(0.5), "metaseq": figures(0.0)},
        "1": {"config": figures(0.75), "ra_cm3": figures(1.0), "metaseq": figures(0.125)},
    }
    assert [line.split() for line in masking.accuracy_table(seeds).splitlines()] == [
        ["config", "joint_accuracy", "25.0%", "/", "75.0%"],
        ["ra_cm3", "joint_accuracy", "50.0%", "/", "100.0%"],
        ["metaseq", "joint_accuracy", "0.0%", "/", "12.5%"],
    ]
