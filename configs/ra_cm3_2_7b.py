"""rac3 plan configs/ra_cm3_2_7b.py

The paper's setting (section 4.1): 2.7B parameters, 4,096 tokens, 150M documents of LAION, CLIP ViT-L/14, 256 GPUs of 80
GB with 16 sequences each. Here a step has as many tokens in 1,024 rows of 16,384: 97% of them are real, where three
documents fill 78% of 4,096. By the plan's arithmetic, with four microbatches and `remat` of `dots`, 256 A100s of 80 GB
use 43.5 GB each, and take 9.04 s a step and 10.5 days in all; 38.7 GB on data/fsdp/tensor of 8/8/4, and 50.6 GB on
64/1/4. `--data-dir` holds img2dataset shards; the VQGAN is taming's Gumbel f8 with 1,024 tokens per image. Nothing of
this size has been run with this code.
"""

from rac3.batches.loader import BatchConfig
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.devices.cluster import Cluster
from rac3.devices.mesh import MeshConfig
from rac3.documents.webdataset import WebDataset
from rac3.experiment import Data, Experiment
from rac3.retrieval.exact import Exact
from rac3.tokens.text import TextTokenizer
from rac3.training.loop import TrainingConfig
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGANConfig


def get_config() -> Experiment:
    return Experiment(
        name="ra_cm3_2_7b",
        data=Data(train=WebDataset("laion"), validation=WebDataset("laion-validation"), test=WebDataset("coco")),
        text=TextTokenizer("facebook/opt-2.7b", vocab_size=50_272),
        vqgan=FrozenVQGAN(
            checkpoint="vqgan_gumbel_f8/last.ckpt",
            dtype="bfloat16",
            model=VQGANConfig(ch_mult=(1, 1, 2, 4), attn_resolutions=(32,), n_embed=8192),  # as the checkpoint has it
        ),
        clip=FrozenCLIP(
            checkpoint="openai/clip-vit-large-patch14",
            dtype="bfloat16",
            model=CLIPConfig(  # as the checkpoint has it
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
                CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    patch_size=14,
                ),
                projection_dim=768,
            ),
        ),
        embedding_dtype="bfloat16",
        retriever=Exact(num_neighbors=32, dtype="bfloat16"),
        batches=BatchConfig(row_length=16_384, max_groups=16, rows=1024),
        training=TrainingConfig(microbatches=4),
        mesh=MeshConfig(fsdp=8),
        cluster=Cluster(documents=150_000_000, hosts=32, gpus=8, cores=96, memory_gb=1000.0),
    )
