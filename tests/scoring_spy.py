"""Known log probabilities in place of a model's."""

from collections.abc import Sequence

import numpy as np
import pytest

from rac3.generation.tasks.score import Part, Scorer


class Told:
    """Gives -(number of the part), spread over its ids, and keeps the parts that were asked for last."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def __call__(self, scorer: Scorer, parts: Sequence[Part]) -> list[np.ndarray]:
        self.parts = [*parts]
        return [
            np.full(part.end - part.start, -number / (part.end - part.start)) for number, part in enumerate(self.parts)
        ]

    @property
    def targets(self) -> list[list[int]]:
        """The ids of each part."""
        return [part.group.targets[part.start : part.end].tolist() for part in self.parts]


def watch_scoring(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(Scorer, "log_probs", lambda self, parts: told(self, parts))
    return told
