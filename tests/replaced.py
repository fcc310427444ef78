"""A run with some of its members replaced, such as its memory by one of four documents."""

from rac3.experiment import Experiment
from rac3.run import Run


def with_members(run: Run, experiment: Experiment | None = None, **members: object) -> Run:
    """The run with these members, as of a subclass; what is open is shared."""
    other = run.variant(experiment or run.experiment, run.trained)
    other.__class__ = type("Replaced", (type(run),), members)
    return other
