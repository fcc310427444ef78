"""rac3 run configs/quickstart.py

The whole chain offline on two CPU cores in minutes: a procedural world, encoders fitted on it, and RA-CM3 against
vanilla CM3, trained with equal compute and compared on entities that neither has seen in training.
"""

from dataclasses import replace

from rac3.batches.loader import BatchConfig
from rac3.batches.masking import Masking
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.documents.world import World
from rac3.evaluation.settings import EvaluationConfig
from rac3.experiment import Data, Experiment
from rac3.generation.copying import Copying
from rac3.generation.sampling import Sampling
from rac3.model.transformer import TransformerConfig
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.tokens.text import TextTokenizer
from rac3.training.loop import TrainingConfig
from rac3.training.optimizer import OptimizerConfig
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGANConfig
from rac3.vqgan.objective import VQGANObjective
from rac3.weights.fitting import FitConfig


def get_config(seed: int = 0) -> Experiment:
    """`seed` also changes the world; `--seed` on the command line changes everything else."""
    world = World(seed=seed, seen=400, unseen=40, tuning=40, documents_per_entity=4)
    tower = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    return Experiment(
        name="quickstart",
        seed=seed,
        query_dropout=0.1,  # captions have ten tokens; 0.2 drops the name, and with it the entity, too often
        data=Data(
            train=replace(world, split="train"),
            memory={"memory": replace(world, split="memory")},
            validation=replace(world, split="validation"),
            tuning=replace(world, split="tuning"),
            test=replace(world, split="test"),
            fit_on=("train", "memory"),  # as a public CLIP has seen many of the things it is queried for
            entity_field="entity",
        ),
        text=TextTokenizer(vocab_size=320),  # spells names by letters, so that new names have known ids
        vqgan=FrozenVQGAN(
            model=VQGANConfig(
                patch_size=4,  # on a CPU, layers at full resolution take most of the time and give little
                ch=32,
                ch_mult=(1, 2),
                num_res_blocks=1,
                attn_resolutions=(),
                resamp_with_conv=False,
                resolution=40,
                z_channels=64,
                embed_dim=16,
                n_embed=64,
                norm_groups=1,
                latent_kernel=1,
                mid_attn=False,
            ),
            objective=VQGANObjective(decay=0.99, revive_below=0.02, locality=0.1),
            fit=FitConfig(steps=1000, batch=8, peak_lr=3e-3),
        ),
        clip=FrozenCLIP(
            model=CLIPConfig(
                text_config=CLIPTextConfig(**tower, max_position_embeddings=32),
                vision_config=CLIPVisionConfig(**tower, image_size=40, patch_size=8),
                projection_dim=64,
            ),
            tokenizer=TextTokenizer(vocab_size=1024),  # most names are one token
            max_logit_scale=3.0,
            text_crop=1.0,
            image_crop=0.4,
            fit=FitConfig(steps=1000, batch=128, peak_lr=3e-3),
        ),
        retriever=Scann(num_neighbors=16),
        selection=Selection(max_similarity=0.999),  # all vectors of a CLIP fitted on a small world are similar
        batches=BatchConfig(
            context_length=192,
            rows=5,
            retrieved_weight=0.5,  # with the 0.1 of the paper, a run as short as this learns the settings too late
            candidates=2,
            masking=Masking(mean_spans=1.5, whole_segments=0.8),
            read_threads=1,
        ),
        model=TransformerConfig(
            num_layers=3,
            embed=128,
            num_heads=4,
            mlp=512,
            dtype="float32",
            attention="plain",  # the fastest form for rows as short as these
            remat="none",
            init_std=0.02,
        ),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=50, weight_decay=0.01),
        training=TrainingConfig(steps=1200, checkpoint_every=100, keep=12),  # among which CM3 at its best is found
        evaluation=EvaluationConfig(
            documents=80,
            image_samples=4,
            caption_samples=4,
            image_sampling=Sampling(temperature=0.2),
            caption_sampling=Sampling(temperature=0.2, copying=Copying(weight=0.2)),
            max_caption_tokens=24,
        ),
    )
