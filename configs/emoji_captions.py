"""rac3 run configs/emoji_captions.py --data-dir DIR

The whole chain on img2dataset shards of 64x64 image-caption pairs: DIR holds the folders `train`, `unseen-memory`,
`validation` and `unseen-test`. Any captioned images in this layout work; if their metadata names no `concept`, add
`--clip.subject-field ""`. The retriever and the distances of pictures need `pip install 'rac3[features]'`. Sized for
two CPU cores and two hours.
For one GPU: `--model.num-layers 12 --model.embed 768 --model.num-heads 12 --model.mlp 3072 --model.dtype bfloat16
--batches.rows 64 --training.steps 20000 --optimizer.peak-lr 6e-4 --optimizer.warmup-steps 500`, a VQGAN of
`--vqgan.model.ch 64 --vqgan.model.n-embed 1024 --vqgan.fit.steps 20000`.
An image is 64 tokens, 256 with `--vqgan.model.ch-mult 1 2 4 --batches.context-length 1024 --batches.row-length 1024`.
"""

from rac3.batches.loader import BatchConfig
from rac3.batches.masking import Masking
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.linear import LinearConfig
from rac3.documents.webdataset import WebDataset
from rac3.evaluation.settings import EvaluationConfig
from rac3.experiment import Data, Experiment
from rac3.generation.sampling import Sampling
from rac3.model.transformer import TransformerConfig
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.tokens.text import TextTokenizer
from rac3.training.loop import TrainingConfig
from rac3.training.optimizer import OptimizerConfig
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGANConfig
from rac3.weights.fitting import FitConfig


def get_config() -> Experiment:
    return Experiment(
        name="emoji_captions",
        query_dropout=0.0,  # with a fifth of their patches dropped, pictures find their subject half as often
        data=Data(
            train=WebDataset("train"),
            memory={"unseen": WebDataset("unseen-memory")},
            validation=WebDataset("validation"),
            test=WebDataset("unseen-test"),
            fit_on=("train", "unseen"),
            entity_field="concept",
        ),
        text=TextTokenizer(vocab_size=2048),
        vqgan=FrozenVQGAN(
            model=VQGANConfig(
                patch_size=4,  # on a CPU, layers at full resolution take most of the time and give little
                ch=32,
                ch_mult=(1, 2),
                num_res_blocks=1,
                attn_resolutions=(),
                resamp_with_conv=False,
                resolution=64,
                z_channels=64,
                embed_dim=8,
                n_embed=256,
                norm_groups=8,
                mid_attn=False,
            ),
            fit=FitConfig(steps=8000, batch=8, peak_lr=4e-3),
        ),
        clip=FrozenCLIP(
            model=LinearConfig(image_size=128),
            tokenizer=TextTokenizer(vocab_size=4096),
            subject_field="concept",
            fit=FitConfig(steps=400, batch=256, peak_lr=2e-3),
        ),
        retriever=Scann(num_neighbors=32),
        selection=Selection(max_similarity=0.98),  # to this CLIP, documents of one subject are above 0.9
        batches=BatchConfig(
            context_length=448,
            row_length=512,
            rows=4,
            retrieved_weight=1.0,  # in a short run, documents teach more as targets than their repetition costs
            candidates=4,
            masking=Masking(whole_segments=0.5),
            read_threads=1,
        ),
        model=TransformerConfig(
            num_layers=4,
            embed=192,
            num_heads=6,
            mlp=768,
            rotary_offsets=True,
            dtype="float32",
            remat="none",
            init_std=0.02,
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=50, weight_decay=0.01),
        training=TrainingConfig(steps=4000, checkpoint_every=400, keep=10),
        evaluation=EvaluationConfig(
            documents=300,
            image_samples=4,
            caption_samples=4,
            image_sampling=Sampling(temperature=0.9, top_p=0.95),
            caption_sampling=Sampling(temperature=0.7),
            max_caption_tokens=40,
            features="efficientnet-lite0",
        ),
    )
