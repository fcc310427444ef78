"""What is made again when something changes: every field of the experiment, and the files that it names.

The answers below are written from what each stage reads, never from the recipes:

    text, vqgan, clip   the documents they are fitted on, or their checkpoint
    documents           a source, text, vqgan                 embeddings, queries   documents, clip
    index               embeddings, the retriever             neighbors             indexes, queries, selection
    train               documents and neighbors of train      evaluation            train, neighbors, clip
    best                train, documents and neighbors of tuning
    infilling           what an evaluation reads, and the documents of the memory
    few_shot            train, clip, held-out documents, those of the memory
    drawings            what an evaluation reads              knowledge           drawings, documents of the memory
    ... cm3             the same of the vanilla CM3, which retrieves nothing, so that its evaluation reads clip itself
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from handmade import experiment_of, workdir_of

from rac3 import recipes
from rac3.cli import EXECUTORS, RETRIEVERS
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.linear import LinearConfig
from rac3.config import InputError
from rac3.documents.tfds import Tfds
from rac3.documents.webdataset import WebDataset
from rac3.documents.world import World
from rac3.evaluation.settings import EvaluationConfig
from rac3.execution.local import Local
from rac3.execution.ray import Ray
from rac3.experiment import Data, Experiment
from rac3.generation.sampling import Sampling
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.scann import Scann
from rac3.run import Run
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.objective import VQGANObjective
from rac3.vqgan.perceptual import PerceptualConfig
from rac3.weights.fitting import FitConfig

Stages = frozenset[str]
Row = tuple[Any, Stages | None]  # another value, and what is made again for it; None: the value is refused

NOTHING: Stages = frozenset()


@dataclass(frozen=True)
class Halved:
    """A processor of a user's own."""

    def __call__(self, log_probs: Any, step: Any) -> Any:
        return log_probs / 2


EVALUATION = frozenset({"evaluation", "evaluation cm3"})
INFILLING = frozenset({"infilling", "infilling cm3"})
FEW_SHOT = frozenset({"few_shot", "few_shot cm3"})
KNOWLEDGE = frozenset({"knowledge", "knowledge cm3"})
DRAWINGS = KNOWLEDGE | {"drawings", "drawings cm3"}
BEST = frozenset({"best", "best cm3"})
EVALUATIONS = EVALUATION | INFILLING | FEW_SHOT | DRAWINGS
MODEL = EVALUATIONS | BEST | {"train", "train cm3"}
JUDGED = frozenset({"drawings", "knowledge"})  # of the model that retrieves
TRAIN_NEIGHBORS = JUDGED | {"neighbors train", "retrieval", "train", "best", "evaluation", "infilling", "few_shot"}
HELD_OUT_NEIGHBORS = frozenset(
    {
        *(f"neighbors {split}" for split in ("validation", "tuning", "test")),
        "retrieval",
        "best",
        "evaluation",
        "infilling",
        *JUDGED,
    }
)
NEIGHBORS = TRAIN_NEIGHBORS | HELD_OUT_NEIGHBORS
INDEX = NEIGHBORS | {"index train", "index memory"}
TRAIN_QUERIES = TRAIN_NEIGHBORS | {"queries train"}
VECTORS = INDEX | {
    "embeddings train",
    "embeddings memory",
    "queries train",
    "queries validation",
    "queries tuning",
    "queries test",
}
DOCUMENTS = (VECTORS | MODEL) | {f"documents {split}" for split in ("train", "memory", "validation", "tuning", "test")}
TEXT = DOCUMENTS | {"text"}
VQGAN = DOCUMENTS | {"vqgan"}
CLIP_DTYPE = VECTORS | EVALUATIONS
CLIP = CLIP_DTYPE | {"clip"}
EVERYTHING = TEXT | VQGAN | CLIP

TRAIN_DOCUMENTS = (NEIGHBORS | MODEL) | {"documents train", "embeddings train", "queries train", "index train"}
MEMORY = HELD_OUT_NEIGHBORS | INFILLING | FEW_SHOT | KNOWLEDGE
MEMORY_DOCUMENTS = MEMORY | {"documents memory", "embeddings memory", "index memory"}
VALIDATION_DOCUMENTS = EVALUATIONS | {
    "documents validation",
    "queries validation",
    "neighbors validation",
    "retrieval",
}
TUNING_DOCUMENTS = BEST | {"documents tuning", "queries tuning", "neighbors tuning", "retrieval"}
TEST_DOCUMENTS = EVALUATIONS | {"documents test", "queries test", "neighbors test", "retrieval"}

WORLD = World(seen=2, unseen=2, tuning=2, documents_per_entity=2)
FIT = {"steps": 20, "batch": 4, "peak_lr": 0.5, "b1": 0.5, "b2": 0.5}

# Encoders are fitted here on train and memory, so that what changes those changes all.
FITTED: dict[str, Row] = {
    "name": ("other", NOTHING),
    "data.train.folder": ("other", EVERYTHING),
    "data.train.caption_field": ("alt", EVERYTHING),
    "data.train.max_pixels": (100, EVERYTHING),
    "data.train.image": ("input.jpg", EVERYTHING),
    "data.train.text": ("caption.txt", EVERYTHING),
    "data.memory": ({"memory": replace(WORLD, split="memory"), "news": WebDataset("other")}, MEMORY),
    "data.memory.memory.split": ("train", EVERYTHING),
    "data.memory.memory.seed": (7, EVERYTHING),
    "data.memory.memory.seen": (3, EVERYTHING),
    "data.memory.memory.unseen": (3, EVERYTHING),
    "data.memory.memory.tuning": (3, EVERYTHING),
    "data.memory.memory.documents_per_entity": (3, EVERYTHING),
    "data.memory.memory.copies": (2, EVERYTHING),
    "data.memory.memory.questions_per_entity": (3, EVERYTHING),
    "data.memory.memory.documents_per_shard": (3, EVERYTHING),
    "data.withdrawn": (("memory",), MEMORY),
    "data.validation.name": ("flickr", VALIDATION_DOCUMENTS),
    "data.validation.split": ("test", VALIDATION_DOCUMENTS),
    "data.validation.image": ("picture", VALIDATION_DOCUMENTS),
    "data.validation.text": ("captions/text", VALIDATION_DOCUMENTS),
    "data.validation.folder": ("other", VALIDATION_DOCUMENTS),
    "data.validation.shard_size": (10, VALIDATION_DOCUMENTS),
    "data.validation.max_pixels": (100, VALIDATION_DOCUMENTS),
    "data.test.split": ("validation", TEST_DOCUMENTS),
    "data.test.seed": (7, TEST_DOCUMENTS),
    "data.test.seen": (3, TEST_DOCUMENTS),
    "data.test.unseen": (3, TEST_DOCUMENTS),
    "data.test.tuning": (3, TEST_DOCUMENTS),
    "data.test.documents_per_entity": (3, TEST_DOCUMENTS),
    "data.test.copies": (2, TEST_DOCUMENTS),
    "data.test.questions_per_entity": (3, TEST_DOCUMENTS),
    "data.test.documents_per_shard": (3, TEST_DOCUMENTS),
    "data.tuning.split": ("validation", TUNING_DOCUMENTS),
    **{
        f"data.tuning.{name}": (value, TUNING_DOCUMENTS)
        for value, names in (
            (7, ("seed",)),
            (
                3,
                (
                    "seen",
                    "unseen",
                    "tuning",
                    "documents_per_entity",
                    "copies",
                    "questions_per_entity",
                    "documents_per_shard",
                ),
            ),
        )
        for name in names
    },
    "data.fit_on": (("train",), EVERYTHING),
    "data.entity_field": ("concept", EVALUATIONS | {"retrieval"}),
    "seed": (1, VQGAN | CLIP),  # a BPE draws nothing
    "workdir": ("elsewhere", NOTHING),
    "data_dir": ("moved", EVERYTHING),  # its shards have the same names
    "max_reject_fraction": (0.5, NOTHING),
    "max_text_tokens": (128, DOCUMENTS),
    "framing": ("pad-white", EVERYTHING),
    "query_dropout": (0.3, TRAIN_QUERIES),
    "num_views": (2, TRAIN_QUERIES),
    "takedowns": ("keys.txt", NEIGHBORS | MODEL),
    "takedowns_missing_ok": (True, NOTHING),
    "embedding_dtype": ("int8", VECTORS),
    "documents_per_shard": (100, VECTORS),
    "executor.threads": (1, NOTHING),
    "compare_with_cm3": (False, NOTHING),
    "filter.max_watermark": (0.9, EVERYTHING),
    "filter.max_unsafe": (0.9, EVERYTHING),
    "filter.min_side": (8, EVERYTHING),
    "text.checkpoint": ("tokenizer", TEXT),
    "text.vocab_size": (300, TEXT),
    "vqgan.checkpoint": ("vqgan/vqgan.ckpt", VQGAN),
    "vqgan.resolution": (64, None),
    "vqgan.dtype": ("bfloat16", DOCUMENTS),  # it is fitted in float32
    "vqgan.model.ch": (4, VQGAN),
    "vqgan.model.ch_mult": ((1, 2), VQGAN),
    "vqgan.model.num_res_blocks": (1, VQGAN),
    "vqgan.model.attn_resolutions": ((8,), VQGAN),
    "vqgan.model.resolution": (128, VQGAN),
    "vqgan.model.in_channels": (1, VQGAN),
    "vqgan.model.out_ch": (1, VQGAN),
    "vqgan.model.z_channels": (8, VQGAN),
    "vqgan.model.embed_dim": (8, VQGAN),
    "vqgan.model.n_embed": (16, VQGAN),
    "vqgan.model.dropout": (0.5, VQGAN),
    "vqgan.model.resamp_with_conv": (False, VQGAN),
    "vqgan.model.patch_size": (2, VQGAN),
    "vqgan.model.norm_groups": (1, VQGAN),
    "vqgan.model.latent_kernel": (1, VQGAN),
    "vqgan.model.mid_attn": (False, VQGAN),
    "vqgan.model.quantizer": ("gumbel", None),
    "vqgan.objective.l1": (2.0, VQGAN),
    "vqgan.objective.l2": (2.0, VQGAN),
    "vqgan.objective.beta": (0.5, VQGAN),
    "vqgan.objective.locality": (0.5, VQGAN),
    "vqgan.objective.decay": (0.9, VQGAN),
    "vqgan.objective.smoothing": (0.5, VQGAN),
    "vqgan.objective.revive_below": (0.5, VQGAN),
    "vqgan.objective.ema_decay": (0.9, VQGAN),
    "vqgan.objective.adversarial.weight": (0.5, VQGAN),
    "vqgan.objective.adversarial.start": (5, VQGAN),
    "vqgan.objective.adversarial.ndf": (4, VQGAN),
    "vqgan.objective.adversarial.n_layers": (2, VQGAN),
    "vqgan.objective.perceptual.weights": (("lpips.pth", "vgg.pth"), VQGAN),
    "vqgan.objective.perceptual.weight": (0.5, VQGAN),
    **{f"vqgan.fit.{name}": (value, VQGAN) for name, value in FIT.items()},
    "vqgan.fit.max_documents": (60_000, VQGAN | TEXT),  # the text tokenizer reads as much as who reads more
    "clip.checkpoint": ("clip", CLIP),
    "clip.dtype": ("bfloat16", CLIP_DTYPE),  # it is fitted in float32
    "clip.model.text_config.vocab_size": (300, CLIP),
    "clip.model.text_config.hidden_size": (64, CLIP),
    "clip.model.text_config.intermediate_size": (64, CLIP),
    "clip.model.text_config.num_hidden_layers": (1, CLIP),
    "clip.model.text_config.num_attention_heads": (1, CLIP),
    "clip.model.text_config.max_position_embeddings": (16, CLIP),
    "clip.model.text_config.hidden_act": ("gelu", CLIP),
    "clip.model.text_config.layer_norm_eps": (0.5, CLIP),
    "clip.model.text_config.eos_token_id": (3, CLIP),
    "clip.model.vision_config.hidden_size": (96, CLIP),
    "clip.model.vision_config.intermediate_size": (64, CLIP),
    "clip.model.vision_config.num_hidden_layers": (1, CLIP),
    "clip.model.vision_config.num_attention_heads": (1, CLIP),
    "clip.model.vision_config.num_channels": (1, CLIP),
    "clip.model.vision_config.image_size": (64, CLIP),
    "clip.model.vision_config.patch_size": (16, CLIP),
    "clip.model.vision_config.hidden_act": ("gelu", CLIP),
    "clip.model.vision_config.layer_norm_eps": (0.5, CLIP),
    "clip.model.projection_dim": (16, CLIP),
    "clip.model.logit_scale_init_value": (1.0, CLIP),
    "clip.tokenizer.checkpoint": ("tokenizer", CLIP),
    "clip.tokenizer.vocab_size": (300, CLIP),
    "clip.max_logit_scale": (3.0, CLIP),
    "clip.text_crop": (0.5, CLIP),
    "clip.image_crop": (0.5, CLIP),
    "clip.subject_field": ("concept", CLIP),
    **{f"clip.fit.{name}": (value, CLIP) for name, value in FIT.items()},
    "clip.fit.max_documents": (70_000, CLIP | TEXT),
    "retriever.num_neighbors": (20, NEIGHBORS),
    "retriever.num_leaves": (50, INDEX),
    "retriever.num_leaves_to_search": (7, NEIGHBORS),
    "retriever.spherical": (False, INDEX),
    "retriever.soar_lambda": (1.5, INDEX),
    "retriever.dimensions_per_block": (4, INDEX),
    "retriever.anisotropic_quantization_threshold": (0.5, INDEX),
    "retriever.reorder_num_neighbors": (40, NEIGHBORS),
    "retriever.reorder_dtype": ("int8", INDEX),
    "selection.max_similarity": (0.5, NEIGHBORS),
    "selection.depth": (9, NEIGHBORS),
    "batches.context_length": (512, MODEL),
    "batches.row_length": (8192, MODEL),
    "batches.max_groups": (5, MODEL),
    "batches.rows": (8, MODEL),
    "batches.num_retrieved": ((0, 1), MODEL),
    "batches.retrieved": ("image", MODEL),
    "batches.retrieved_weight": (1.0, MODEL),
    "batches.candidates": (5, MODEL),
    "batches.masking.preset": ("cm3", MODEL),
    "batches.masking.mean_spans": (2.0, MODEL),
    "batches.masking.max_spans": (4, MODEL),
    "batches.masking.whole_segments": (0.5, MODEL),
    "batches.read_threads": (1, NOTHING),
    "model.num_layers": (2, MODEL),
    "model.embed": (64, MODEL),
    "model.num_heads": (2, MODEL),
    "model.mlp": (64, MODEL),
    "model.offset_embedding": (False, MODEL),
    "model.rotary_offsets": (True, MODEL),
    "model.dtype": ("float32", MODEL),
    "model.attention": ("plain", NOTHING),  # the same numbers up to rounding
    "model.remat": ("full", NOTHING),  # the same numbers with less memory
    "model.init_std": (0.5, MODEL),
    "model.init_from": ("opt", MODEL),
    "optimizer.peak_lr": (0.5, MODEL),
    "optimizer.warmup_steps": (5, MODEL),
    "optimizer.b1": (0.5, MODEL),
    "optimizer.b2": (0.5, MODEL),
    "optimizer.eps": (0.5, MODEL),
    "optimizer.weight_decay": (0.5, MODEL),
    "optimizer.clip_norm": (0.5, MODEL),
    "training.steps": (50, MODEL),
    "training.checkpoint_every": (5, BEST),
    "training.log_every": (5, NOTHING),
    "training.keep": (5, BEST),
    "training.stall_minutes": (5.0, NOTHING),
    "training.loss_chunk": (5, NOTHING),
    "training.microbatches": (2, NOTHING),
    "training.max_skipped": (5, NOTHING),
    "training.profile": ("2:3", NOTHING),
    "mesh.data": (1, NOTHING),
    "mesh.fsdp": (2, NOTHING),
    "mesh.tensor": (2, NOTHING),
    "mesh.rules": ((("batch", ("data",)),), NOTHING),
    "evaluation.num_retrieved": (1, EVALUATION | INFILLING | DRAWINGS | {"best"}),
    "evaluation.documents": (5, EVALUATIONS | BEST | {"retrieval"}),
    "evaluation.image_samples": (5, EVALUATION | DRAWINGS),
    "evaluation.caption_samples": (5, EVALUATION),
    "evaluation.image_sampling.temperature": (0.5, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.top_p": (0.5, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.top_k": (5, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.guidance.scale": (2.0, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.guidance.without": ("documents", EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.contrast.k": (4, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.contrast.alpha": (0.5, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.contrast.without": ("documents", EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.copying.weight": (0.5, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.copying.sharpness": (2.0, EVALUATION | INFILLING | DRAWINGS),
    "evaluation.image_sampling.processors": ((Halved(),), EVALUATION | INFILLING | DRAWINGS),
    "evaluation.caption_sampling.temperature": (0.5, EVALUATION),
    "evaluation.caption_sampling.top_p": (0.5, EVALUATION),
    "evaluation.caption_sampling.top_k": (5, EVALUATION),
    "evaluation.caption_sampling.guidance.scale": (2.0, None),
    "evaluation.caption_sampling.guidance.without": ("documents", EVALUATION),
    "evaluation.caption_sampling.contrast.k": (4, None),
    "evaluation.caption_sampling.contrast.alpha": (0.5, EVALUATION),
    "evaluation.caption_sampling.contrast.without": ("documents", EVALUATION),
    "evaluation.caption_sampling.copying.weight": (0.5, EVALUATION),
    "evaluation.caption_sampling.copying.sharpness": (2.0, EVALUATION),
    "evaluation.caption_sampling.processors": ((Halved(),), EVALUATION),
    "evaluation.max_caption_tokens": (5, EVALUATION),
    "evaluation.features": ("vgg.pth", EVALUATION | KNOWLEDGE),
    "evaluation.control": (False, NOTHING),  # one evaluation more or less, and this one as it is
    "cluster.gpu": ("H100", NOTHING),
    **{
        f"cluster.{name}": (value, NOTHING)
        for value, names in (
            (3, ("documents", "memory_documents", "hosts", "cores", "gpus")),
            (0.5, ("image_kilobytes", "memory_gb", "gpu_memory_gb", "gpu_tflops", "core_gflops")),
            (0.5, ("decode_images_per_second", "utilization", "link_gb_per_second", "network_gb_per_second")),
        )
        for name in names
    },
}

# Published encoders never see the documents, and have their own architecture.
LOADED: dict[str, Row] = {
    name: (value, NOTHING if name.startswith(("vqgan.", "clip.", "text.")) else stages)
    for name, (value, stages) in FITTED.items()
} | {
    **{f"data.train.{name}": (FITTED[f"data.train.{name}"][0], TRAIN_DOCUMENTS) for name in ("folder", "max_pixels")},
    "data.train.caption_field": ("alt", TRAIN_DOCUMENTS),
    **{
        name: (value, MEMORY_DOCUMENTS) for name, (value, _) in FITTED.items() if name.startswith("data.memory.memory.")
    },
    "data.fit_on": (("train",), NOTHING),
    "seed": (1, TRAIN_QUERIES | MODEL),
    "data_dir": ("moved", DOCUMENTS),
    "filter.max_watermark": (0.9, DOCUMENTS),
    "filter.max_unsafe": (0.9, DOCUMENTS),
    "filter.min_side": (8, DOCUMENTS),
    "text.checkpoint": ("copy", TEXT),
    "vqgan.checkpoint": ("copy/vqgan.ckpt", VQGAN),
    "vqgan.resolution": (64, VQGAN),
    "vqgan.dtype": ("bfloat16", DOCUMENTS),
    "clip.checkpoint": ("copy", CLIP),
    "clip.dtype": ("bfloat16", CLIP_DTYPE),
}

RETRIEVER_FIELDS: dict[type, dict[str, Row]] = {
    Scann: {name.removeprefix("retriever."): row for name, row in FITTED.items() if name.startswith("retriever.")},
    Exact: {
        "num_neighbors": (20, NEIGHBORS),
        "dtype": ("bfloat16", NEIGHBORS),
        "overscan": (9, NEIGHBORS),
        "block_rows": (100, NEIGHBORS),
        "query_rows": (100, NEIGHBORS),
    },
    Faiss: {
        "num_neighbors": (20, NEIGHBORS),
        "factory": ("HNSW32", INDEX),
        "search": ("efSearch=64", NEIGHBORS),
        "reorder_num_neighbors": (40, NEIGHBORS),
        "seed": (1, INDEX),
    },
    Fixed: {"keys": (("b",), INDEX)},
    Random: {"num_neighbors": (20, NEIGHBORS), "seed": (1, NEIGHBORS)},
    NoRetriever: {"num_neighbors": (1, None)},
}

EXECUTOR_FIELDS: dict[type, dict[str, Any]] = {
    Local: {"threads": 1},
    Ray: {"workers": 3, "gpus_per_worker": 2, "cpus_per_worker": 2, "threads": 1, "address": "auto"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the tables name, as far as a recipe looks: what they hold is read by the stages alone."""
    for path in (
        *("data/train/0.tar", "data/other/0.tar", "moved/train/0.tar", "moved/other/0.tar"),
        *("tokenizer/tokenizer.json", "vqgan/vqgan.ckpt", "vqgan/vqgan.yaml", "clip/config.json"),
        *("clip/model.safetensors", "clip/tokenizer.json", "lpips.pth", "vgg.pth", "keys.txt"),
        *("copy/tokenizer.json", "copy/vqgan.ckpt", "copy/vqgan.yaml", "copy/config.json", "copy/model.safetensors"),
        *("opt/config.json", "opt/model.safetensors"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("key 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tfds, "shards", lambda self, data_dir: ["000000000-000000010"])  # no dataset is prepared
    monkeypatch.setattr(Tfds, "files", lambda self, data_dir: [])
    return tmp_path


@pytest.fixture
def fitted(folder: Path) -> Experiment:
    return Experiment(
        name="base",
        data=Data(
            train=WebDataset("train"),
            memory={"memory": replace(WORLD, split="memory")},
            validation=Tfds("coco_captions", "val"),
            test=replace(WORLD, split="test"),
            tuning=replace(WORLD, split="tuning"),
            fit_on=("train", "memory"),
        ),
        data_dir="data",
        vqgan=FrozenVQGAN(objective=VQGANObjective(decay=0.99), fit=FitConfig(steps=10)),
        clip=FrozenCLIP(fit=FitConfig(steps=10)),
        evaluation=EvaluationConfig(caption_sampling=Sampling(), image_sampling=Sampling()),
    )


def with_checkpoints(fitted: Experiment) -> Experiment:
    return replace(
        fitted,
        text=replace(fitted.text, checkpoint="tokenizer"),
        vqgan=replace(fitted.vqgan, checkpoint="vqgan/vqgan.ckpt"),
        clip=replace(fitted.clip, checkpoint="clip"),
    )


@pytest.fixture(autouse=True)
def each_recipe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are made of one another: documents for embeddings, index, neighbors ... of which `made` asks for all."""
    for name in (
        *("source_identity", "text", "vqgan", "clip", "documents", "embeddings", "queries", "index", "neighbors"),
        *("train", "takedown_keys"),
    ):
        monkeypatch.setattr(recipes, name, remembered(getattr(recipes, name)))


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    def recall(experiment: Experiment, *split: str) -> Any:
        key = id(experiment), split
        if key not in known:
            known[key] = make(experiment, *split), experiment  # which lives on, so that no other gets its id
        return known[key][0]

    known: dict[Any, tuple[Any, Experiment]] = {}
    return recall


def made(experiment: Experiment, trained: Experiment | None = None) -> dict[str, str]:
    """The fingerprint of everything, by stage and split."""
    experiment = replace(experiment)  # as of now: the files that it names may change
    trained = trained or experiment
    found = {stage: getattr(recipes, stage)(experiment) for stage in ("text", "vqgan", "clip", "retrieval")}
    for stage, splits in (
        ("documents", ("train", "memory", "validation", "tuning", "test")),
        ("embeddings", ("train", "memory")),
        ("queries", ("train", "validation", "tuning", "test")),
        ("index", ("train", "memory")),
        ("neighbors", ("train", "validation", "tuning", "test")),
    ):
        found |= {f"{stage} {split}": getattr(recipes, stage)(experiment, split) for split in splits}
    found |= {"train": recipes.train(trained), "evaluation": recipes.evaluation(experiment, trained)}
    plain = trained.vanilla()
    found |= {"best": recipes.best(trained), "best cm3": recipes.best(plain)}
    found |= {"train cm3": recipes.train(plain), "evaluation cm3": recipes.evaluation(plain, plain)}
    for stage in ("infilling", "few_shot"):
        found |= {stage: getattr(recipes, stage)(experiment, trained)}
        found |= {f"{stage} cm3": getattr(recipes, stage)(plain, plain)}
    for model, pair in (("", (experiment, trained)), (" cm3", (plain, plain))):
        drawings = recipes.drawings(*pair)
        found |= {f"drawings{model}": drawings, f"knowledge{model}": recipes.knowledge(pair[0], {"it": drawings})}
    return {stage: recipe.fingerprint for stage, recipe in found.items()}


def changes(before: dict[str, str], after: dict[str, str]) -> Stages:
    return frozenset(stage for stage in before if before[stage] != after[stage])


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields that hold no dataclass; a mapping of parts counts itself, and each of its parts."""
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{path}{field.name}"
        if isinstance(inner, Mapping):
            yield name
            for key, part in inner.items():
                yield from leaves(part, f"{name}.{key}.")
        elif dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{name}.")
        else:
            yield name


def changed(value: Any, path: str, new: Any) -> Any:
    name, _, rest = path.partition(".")
    if isinstance(value, Mapping):
        return {**value, name: changed(value[name], rest, new)}
    return replace(value, **{name: changed(getattr(value, name), rest, new) if rest else new})


def wrong_rows(base: Experiment, table: Mapping[str, Row]) -> dict[str, Any]:
    """The rows that the recipes contradict: what they make again without need, and what they leave stale."""
    before, wrong = made(base), {}
    for path, (value, stages) in table.items():
        if stages is None:
            with pytest.raises(InputError):
                changed(base, path, value)
            continue
        other = changed(base, path, value)
        assert other != base, f"{path}: give the row another value than {value!r}, which the base has"
        found = changes(before, made(other))
        if found != stages:
            wrong[path] = {"needless": sorted(found - stages), "stale": sorted(stages - found)}
    return wrong


def test_each_field_makes_again_what_reads_it(fitted: Experiment):
    assert set(leaves(fitted)) == set(FITTED), "each field needs a row: what is made again when it changes"
    assert wrong_rows(fitted, FITTED) == {}


def test_published_encoders_do_not_depend_on_the_documents(fitted: Experiment):
    assert LOADED.keys() == FITTED.keys()
    others = {path: row for path, row in LOADED.items() if row != FITTED[path]}
    assert len(others) > 80
    assert wrong_rows(with_checkpoints(fitted), others) == {}


@pytest.mark.parametrize("kind", RETRIEVER_FIELDS)
def test_each_field_of_a_retriever(kind: Any, fitted: Experiment):
    retriever = Fixed(("a",)) if kind is Fixed else kind()
    fields = RETRIEVER_FIELDS[kind]
    assert set(leaves(retriever)) == set(fields)
    rows = {f"retriever.{name}": row for name, row in fields.items()}
    assert wrong_rows(replace(fitted, retriever=retriever), rows) == {}


def test_the_tables_name_every_retriever_and_executor():
    assert set(RETRIEVER_FIELDS) == set(RETRIEVERS.values())
    assert set(EXECUTOR_FIELDS) == set(EXECUTORS.values())


@pytest.mark.parametrize("kind", EXECUTOR_FIELDS)
def test_who_makes_it_decides_nothing(kind: Any, fitted: Experiment):
    executor, fields = kind(), EXECUTOR_FIELDS[kind]
    assert set(leaves(executor)) == set(fields)
    for other in (executor, *(replace(executor, **{name: value}) for name, value in fields.items())):
        assert made(replace(fitted, executor=other)) == made(fitted)


def test_another_retriever_makes_indexes_again_but_no_vectors(fitted: Experiment):
    assert changes(made(fitted), made(replace(fitted, retriever=Exact()))) == INDEX
    assert changes(made(replace(fitted, retriever=Random())), made(replace(fitted, retriever=Exact()))) == INDEX


def test_a_retriever_at_inference_does_not_train_again(fitted: Experiment):
    exact = replace(fitted, retriever=Exact())
    assert changes(made(fitted), made(exact, trained=fitted)) == INDEX - {"train", "best", "few_shot"}
    inputs = recipes.evaluation(exact, fitted).input_fingerprints
    assert inputs["train"] == recipes.train(fitted).fingerprint
    for split in ("validation", "test"):
        assert inputs[f"neighbors {split}"] == recipes.neighbors(exact, split).fingerprint


def test_withdrawn_documents_at_inference_do_not_train_again(fitted: Experiment):
    swapped = made(replace(fitted, takedowns="keys.txt"), trained=fitted)
    assert changes(made(fitted), swapped) == NEIGHBORS - {"train", "best"}


def test_the_vanilla_cm3_reads_no_neighbors(fitted: Experiment):
    assert set(recipes.train(fitted.vanilla()).inputs) == {"documents"}
    assert set(recipes.train(fitted).inputs) == {"documents", "neighbors"}


def test_training_retrieves_from_the_training_documents_alone(fitted: Experiment):
    assert fitted.data.memory_splits("train") == ["train"]
    assert fitted.data.memory_splits("validation") == fitted.data.memory_splits("test") == ["train", "memory"]


def test_the_step_of_a_model_tells_its_evaluations_apart(fitted: Experiment):
    """And the last step has no number: what was made before there were others is current."""
    for make in (recipes.evaluation, recipes.infilling, recipes.few_shot, recipes.drawings):
        steps = {make(fitted, fitted, step).fingerprint for step in (None, 3, 5)}
        assert len(steps) == 3
        assert make(fitted, fitted).fingerprint == make(fitted, fitted, None).fingerprint


def test_an_evaluation_of_few_shot_depends_on_its_ways(fitted: Experiment):
    """One that was made when there were fewer lacks figures."""
    assert recipes.few_shot(fitted, fitted).config["scored"] == ["text", "image", "apart"]


def test_a_split_that_is_not_there_is_not_evaluated(fitted: Experiment):
    alone = replace(fitted, data=replace(fitted.data, validation=None))
    inputs = recipes.evaluation(alone, alone).inputs
    assert set(inputs) == {"train", "clip", "documents test", "neighbors test"}
    memory = {"documents train", "documents memory"}
    assert set(recipes.infilling(alone, alone).inputs) == set(inputs) | memory
    assert set(recipes.few_shot(alone, alone).inputs) == {"train", "clip", "documents test"} | memory
    assert set(recipes.retrieval(alone).inputs) == {"neighbors train", "neighbors tuning", "neighbors test"}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("tokenizer/tokenizer.json", TEXT),
        ("vqgan/vqgan.ckpt", VQGAN),
        ("vqgan/vqgan.yaml", VQGAN),
        ("clip/model.safetensors", CLIP),
        ("clip/config.json", CLIP),
        ("clip/tokenizer.json", CLIP),
        ("clip/README.md", NOTHING),
        ("vqgan/README.md", NOTHING),
    ],
)
@pytest.mark.parametrize("content", ["another checkpoint, of another size", "key 2\n"])
def test_a_checkpoint_is_known_by_what_its_files_hold(
    file: str, stages: Stages, content: str, fitted: Experiment, folder: Path
):
    loaded = with_checkpoints(fitted)
    before = made(loaded)
    (folder / file).write_text(content)
    assert changes(before, made(loaded)) == stages


def test_a_checkpoint_is_the_same_by_any_name_of_its_folder(fitted: Experiment, folder: Path):
    loaded = with_checkpoints(fitted)
    absolute = replace(
        loaded,
        text=replace(loaded.text, checkpoint=str(folder / "tokenizer")),
        vqgan=replace(loaded.vqgan, checkpoint=str(folder / "vqgan" / "vqgan.ckpt")),
        clip=replace(loaded.clip, checkpoint=str(folder / "clip")),
    )
    assert made(absolute) == made(loaded)


def test_the_tokenizer_of_a_fitted_clip_is_known_by_its_files(fitted: Experiment, folder: Path):
    experiment = changed(fitted, "clip.tokenizer.checkpoint", "tokenizer")
    before = made(experiment)
    (folder / "tokenizer" / "tokenizer.json").write_text("key 2\n")  # of the same size
    assert changes(before, made(experiment)) == CLIP


def test_weights_of_the_perceptual_loss_are_known_by_what_they_hold(fitted: Experiment, folder: Path):
    objective = replace(fitted.vqgan.objective, perceptual=PerceptualConfig(("lpips.pth", "vgg.pth")))
    experiment = replace(fitted, vqgan=replace(fitted.vqgan, objective=objective))
    before = made(experiment)
    (folder / "vgg.pth").write_text("key 2\n")
    assert changes(before, made(experiment)) == VQGAN


def test_references_are_known_by_their_network_and_their_documents(fitted: Experiment, folder: Path):
    """A split is compared with its own pictures alone; infilling and few-shot with none."""

    def references(experiment: Experiment) -> list[str]:
        return [recipes.reference(experiment, split).fingerprint for split in ("validation", "test")]

    compared = changed(fitted, "evaluation.features", "vgg.pth")
    before, known = made(compared), references(compared)
    assert changes(made(fitted), before) == EVALUATION | KNOWLEDGE
    moved = changed(compared, "data.test.seed", 7)
    assert [a == b for a, b in zip(known, references(moved), strict=True)] == [True, False]
    for other in ("evaluation.documents", 5), ("clip.dtype", "bfloat16"), ("evaluation.features", "lpips.pth"):
        assert not set(known) & set(references(changed(compared, *other)))
    assert references(changed(compared, "evaluation.image_samples", 5)) == known
    (folder / "vgg.pth").write_text("key 2\n")
    assert not set(known) & set(references(replace(compared)))
    assert changes(before, made(compared)) == EVALUATION | KNOWLEDGE


def test_an_artifact_that_is_open_is_no_input_of_what_does_not_name_it(tmp_path: Path):
    """CLIP is fitted with a tokenizer of its own, so that another text tokenizer leaves it as it is."""
    experiment = experiment_of({"train": [[]], "test": [[]]})
    run = Run(experiment, workdir_of(experiment, tmp_path / "workdir"))
    assert run.tokenizer.size == 256
    fitted = replace(experiment, clip=FrozenCLIP())
    refused = pytest.raises(RuntimeError, match=r"^text is read while writing clip.*rac3\.recipes$")
    with refused, run.workdir.write(recipes.clip(fitted)):
        assert run.tokenizer
    assert run.workdir.find(recipes.clip(fitted)) is None
    with run.workdir.write(recipes.documents(experiment, "test")):
        assert run.tokenizer.size == 256


@pytest.mark.parametrize(
    ("name", "value", "stages"),
    [
        ("model.projection_dim", 64, CLIP),
        ("model.image_size", 128, CLIP),
        ("model.vocab_size", 300, CLIP),
        ("image_crop", 0.5, NOTHING),  # linear towers see whole images
        ("text_crop", 0.5, CLIP),
        ("dtype", "bfloat16", CLIP_DTYPE),
    ],
)
def test_what_a_linear_clip_depends_on(name: str, value: Any, stages: Stages, fitted: Experiment):
    linear = replace(fitted, clip=replace(fitted.clip, model=LinearConfig()))
    assert {each.name for each in fields(LinearConfig)} == {"projection_dim", "image_size", "vocab_size"}
    assert changes(made(linear), made(changed(linear, f"clip.{name}", value))) == stages


def test_new_shards_of_a_source_make_its_documents_again(fitted: Experiment, folder: Path):
    loaded = with_checkpoints(fitted)
    before = made(loaded)
    (folder / "data" / "train" / "1.tar").touch()
    assert changes(before, made(loaded)) == TRAIN_DOCUMENTS


@pytest.mark.parametrize("name", ["0.tar", "0.parquet"])
def test_a_file_that_changes_under_its_name_makes_its_documents_again(name: str, fitted: Experiment, folder: Path):
    """A corrected shard, or the table next to it: of another size, or of another time of change."""
    loaded, path = with_checkpoints(fitted), folder / "data" / "train" / name
    path.write_text("key 1\n")
    os.utime(path, ns=(10, 10))
    before = made(loaded)
    (folder / "data" / "train" / "notes.txt").write_text("no shard")
    assert made(loaded) == before
    path.write_text("key 2\n")
    os.utime(path, ns=(10, 11))
    assert changes(before, made(loaded)) == TRAIN_DOCUMENTS
    path.write_text("key 23\n")
    os.utime(path, ns=(10, 10))
    assert changes(before, made(loaded)) == TRAIN_DOCUMENTS


def test_takedowns_are_known_by_their_keys(fitted: Experiment, folder: Path):
    """Not by the file's name, the order, or blank lines."""
    experiment = replace(fitted, takedowns="keys.txt")
    (folder / "keys.txt").write_text("b\na\n")
    before = made(experiment)
    (folder / "other.txt").write_text("\n a\n\nb \nb\n")
    assert made(replace(experiment, takedowns="other.txt")) == before
    (folder / "keys.txt").write_text("a\nb\nc\n")
    assert changes(before, made(experiment)) == NEIGHBORS | MODEL
    (folder / "keys.txt").write_text("\n")
    assert made(experiment) == made(fitted)


def test_text_is_fitted_on_as_many_documents_as_the_encoder_that_reads_more(fitted: Experiment):
    """One that reads fewer than the other changes nothing of the text tokenizer."""
    more = changed(fitted, "clip.fit.max_documents", 90_000)
    assert changes(made(more), made(changed(more, "vqgan.fit.max_documents", 100))) == VQGAN


def test_the_format_of_the_store_is_part_of_the_documents(fitted: Experiment, monkeypatch: pytest.MonkeyPatch):
    """Documents that another version of the store wrote are made again, and all that is made of them."""
    before = made(fitted)
    monkeypatch.setattr(recipes, "FORMAT", recipes.FORMAT + 1)
    assert changes(before, made(fitted)) == frozenset(before) - {"text", "vqgan", "clip"}
