"""rac3 plan configs/ra_cm3_125m.py

The recipe of the paper's 2.7B model at the size of OPT-125M. The paper's are the data, the masking, K, alpha, the batch
and the warm-up (`ra_cm3_2_7b.py`). Ours is the choice of the size: its widths and its learning rate are those of OPT
(arXiv 2205.01068, table 1). One GPU holds the state of such a model, so the mesh shards the batch alone. By the plan's
arithmetic 256 A100s of 80 GB use 7.73 GB each, and take 0.481 s a step and 0.557 days in all.
"""

from dataclasses import replace

from rac3.configs.ra_cm3_2_7b import get_config as ra_cm3_2_7b

from rac3.devices.mesh import MeshConfig
from rac3.experiment import Experiment


def get_config() -> Experiment:
    base = ra_cm3_2_7b()
    return replace(
        base,
        name="ra_cm3_125m",
        model=replace(base.model, num_layers=12, embed=768, num_heads=12, mlp=3072),
        optimizer=replace(base.optimizer, peak_lr=6e-4),
        mesh=MeshConfig(),
    )
