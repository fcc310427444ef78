"""rac3 run tests/tiny_config.py

The quickstart, shrunken until it runs in seconds: what the tests run whole. It learns next to nothing.
"""

from dataclasses import replace

from rac3.configs.quickstart import get_config as quickstart

from rac3.documents.world import World
from rac3.experiment import Experiment
from rac3.weights.fitting import FitConfig


def get_config() -> Experiment:
    full = quickstart()
    world = World(seen=12, unseen=4, documents_per_entity=3, questions_per_entity=1)
    splits = {split: replace(world, split=split) for split in ("train", "validation", "test")}
    splits["tuning"] = replace(world, split="tuning", tuning=3)  # of which the memory shows none
    model = replace(full.vqgan.model, ch=4, z_channels=8, n_embed=16)
    clip_model = replace(
        full.clip.model,
        text_config=replace(full.clip.model.text_config, hidden_size=32, intermediate_size=32),
        vision_config=replace(full.clip.model.vision_config, hidden_size=32, intermediate_size=32),
    )
    return replace(
        full,
        name="tiny",
        data=replace(full.data, memory={"memory": replace(world, split="memory")}, **splits),
        text=replace(full.text, vocab_size=300),
        vqgan=replace(full.vqgan, model=model, fit=FitConfig(steps=6, batch=8, peak_lr=3e-3)),
        clip=replace(full.clip, model=clip_model, fit=FitConfig(steps=6, batch=16, peak_lr=1e-3)),
        batches=replace(full.batches, rows=8),
        model=replace(full.model, num_layers=2, embed=32, num_heads=2, mlp=64),
        training=replace(full.training, steps=6, checkpoint_every=3, log_every=2),
        evaluation=replace(full.evaluation, documents=4, image_samples=2, caption_samples=2, max_caption_tokens=8),
    )
