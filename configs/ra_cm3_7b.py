"""rac3 plan configs/ra_cm3_7b.py

The recipe of the paper's 2.7B model at the size of OPT-6.7B. The paper's are the data, the masking, K, alpha, the batch
and the warm-up (`ra_cm3_2_7b.py`). Ours is the choice of the size: its widths and its learning rate are those of OPT
(arXiv 2205.01068, table 1). By the plan's arithmetic 256 A100s of 80 GB use 67.4 GB each, and take 22.1 s a step and
25.6 days in all.
"""

from dataclasses import replace

from rac3.configs.ra_cm3_2_7b import get_config as ra_cm3_2_7b

from rac3.experiment import Experiment


def get_config() -> Experiment:
    base = ra_cm3_2_7b()
    return replace(
        base,
        name="ra_cm3_7b",
        model=replace(base.model, num_layers=32, embed=4096, num_heads=32, mlp=16384),
        optimizer=replace(base.optimizer, peak_lr=1.2e-4),
        mesh=replace(base.mesh, fsdp=16),  # 8 does not fit 80 GB
    )
