"""RA-CM3 in JAX: a retrieval-augmented multimodal language model that generates images and text.

import rac3

model = rac3.load("runs/quickstart")
model.generate("a red fox").images[0]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac3.documents.document import Document
    from rac3.experiment import Experiment
    from rac3.experiment_file import load

__all__ = ["Document", "Experiment", "load"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import rac3` alone loads nothing."""
    import importlib

    where = {"Document": "rac3.documents.document", "Experiment": "rac3.experiment", "load": "rac3.experiment_file"}
    if name not in where:
        raise AttributeError(f"module 'rac3' has no attribute {name!r}")
    return getattr(importlib.import_module(where[name]), name)
