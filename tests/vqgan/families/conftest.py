"""Modules of the peers, made with the same random biases in every run."""

import pytest


@pytest.fixture(autouse=True)
def seeded() -> None:
    pytest.importorskip("torch").manual_seed(0)
