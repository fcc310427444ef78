"""rac3 plan configs/ra_cm3_350m.py

The recipe of the paper's 2.7B model at the size of OPT-350M. The paper's are the data, the masking, K, alpha, the batch
and the warm-up (`ra_cm3_2_7b.py`). Ours is the choice of the size: its widths and its learning rate are those of OPT
(arXiv 2205.01068, table 1). One GPU holds the state of such a model, so the mesh shards the batch alone. The published
OPT-350M has another architecture (LayerNorms after the residuals), so `--model.init-from` refuses it. By the plan's
arithmetic 256 A100s of 80 GB use 18.8 GB each, and take 1.33 s a step and 1.54 days in all.
"""

from dataclasses import replace

from rac3.configs.ra_cm3_2_7b import get_config as ra_cm3_2_7b

from rac3.devices.mesh import MeshConfig
from rac3.experiment import Experiment


def get_config() -> Experiment:
    base = ra_cm3_2_7b()
    return replace(
        base,
        name="ra_cm3_350m",
        model=replace(base.model, num_layers=24, embed=1024, num_heads=16, mlp=4096),
        optimizer=replace(base.optimizer, peak_lr=3e-4),
        mesh=MeshConfig(),
    )
