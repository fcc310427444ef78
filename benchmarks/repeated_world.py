"""python benchmarks/ablations.py benchmarks/repeated_world.py --workdir DIR --seeds 0 1 2 --steps 600

The world of the quickstart with every training and memory document three times, in faint noise, as the web repeats its
pictures. Without redundancy avoidance, two retrieved documents are one.
"""

from dataclasses import replace

from rac3.config import load_config_module
from rac3.experiment import Experiment


def get_config(seed: int = 0) -> Experiment:
    config = load_config_module("quickstart").get_config(seed)
    data = config.data
    return replace(
        config,
        name="repeated_world",
        data=replace(
            data,
            train=replace(data.train, copies=3),
            memory={name: replace(source, copies=3) for name, source in data.memory.items()},
        ),
    )
