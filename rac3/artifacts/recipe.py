"""What decides the content of an artifact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rac3.config import fingerprint

COMMANDS = {
    **dict.fromkeys(
        ("text", "vqgan", "clip", "documents", "embeddings", "queries", "index", "neighbors"), "rac3 prepare"
    ),
    "train": "rac3 train",
    "best": "rac3 evaluate",
    "retrieval": "rac3 evaluate --task retrieval",
    "reference": "rac3 evaluate",
    "evaluation": "rac3 evaluate",
    "infilling": "rac3 evaluate --task infilling",
    "few_shot": "rac3 evaluate --task few-shot",
    "coco": "rac3 evaluate --task coco",
    "drawings": "rac3 evaluate --task knowledge",
    "knowledge": "rac3 evaluate --task knowledge",
}
"""What makes an artifact, by the stage of its recipe."""
WHOLE = "rac3 run"  # what makes everything


@dataclass(frozen=True, eq=False)
class Recipe:
    """What decides the content of an artifact: the stage, its part of the config, and the artifacts it reads.

    Two recipes with one fingerprint make the same artifact.
    """

    stage: str
    config: Any
    inputs: Mapping[str, "Recipe"] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"stage": self.stage, "config": self.config, "inputs": self.input_fingerprints})

    @property
    def input_fingerprints(self) -> dict[str, str]:
        return {name: recipe.fingerprint for name, recipe in self.inputs.items()}

    @cached_property
    def reads(self) -> frozenset[str]:
        """The fingerprints of all artifacts that the content depends on: the inputs, their inputs, and so on."""
        direct = self.inputs.values()
        return frozenset(recipe.fingerprint for recipe in direct).union(*(recipe.reads for recipe in direct))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)
