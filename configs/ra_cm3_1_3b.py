"""rac3 plan configs/ra_cm3_1_3b.py

The recipe of the paper's 2.7B model at the size of OPT-1.3B. The paper's are the data, the masking, K, alpha, the batch
and the warm-up (`ra_cm3_2_7b.py`). Ours is the choice of the size: its widths and its learning rate are those of OPT
(arXiv 2205.01068, table 1). By the plan's arithmetic 256 A100s of 80 GB use 26.4 GB each, and take 4.57 s a step and
5.29 days in all.
"""

from dataclasses import replace

from rac3.configs.ra_cm3_2_7b import get_config as ra_cm3_2_7b

from rac3.experiment import Experiment


def get_config() -> Experiment:
    base = ra_cm3_2_7b()
    return replace(
        base,
        name="ra_cm3_1_3b",
        model=replace(base.model, num_layers=24, embed=2048, num_heads=32, mlp=8192),
        optimizer=replace(base.optimizer, peak_lr=2e-4),
    )
