"""What decides the content of an artifact."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rac3.config import fingerprint


@dataclass(frozen=True)
class Recipe:
    """What decides the content of an artifact: the stage, its part of the config, and the artifacts it reads."""

    stage: str
    config: Any
    inputs: Mapping[str, str]  # name -> fingerprint

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"stage": self.stage, "config": self.config, "inputs": self.inputs})
