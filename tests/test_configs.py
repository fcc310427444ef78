"""The shipped configs: the paper's numbers, and the promises of the small ones."""

from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from rac3.cli import run
from rac3.config import load_config_module, shipped_configs
from rac3.documents.webdataset import WebDataset
from rac3.experiment import Experiment
from rac3.retrieval.exact import Exact
from rac3.retrieval.scann import Scann
from rac3.stages.train import initializer

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def paper() -> Experiment:
    return load_config_module(str(CONFIGS / "ra_cm3_2_7b.py")).get_config()


# Sections 3.2, 3.3, 4.1 and 4.2 of arXiv 2211.12561, and the OPT shape of 2.7B (arXiv 2205.01068, table 1).
PAPER = {
    "filter.max_watermark": 0.5,
    "filter.max_unsafe": 0.5,
    "filter.min_side": 256,
    "query_dropout": 0.2,
    "selection.max_similarity": 0.9,
    "batches.context_length": 4096,
    "batches.num_retrieved": (0, 1, 2),
    "batches.retrieved": "document",
    "batches.retrieved_weight": 0.1,
    "batches.masking.preset": "ra_cm3",
    "batches.masking.mean_spans": 1.0,
    "batches.masking.max_spans": 16,
    "batches.masking.whole_segments": 0.0,
    "model.num_layers": 32,
    "model.embed": 2560,
    "model.num_heads": 32,
    "model.mlp": 10240,
    "model.init_std": 0.006,
    "optimizer.peak_lr": 1e-4,
    "optimizer.warmup_steps": 1500,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.clip_norm": 1.0,
    "optimizer.weight_decay": 0.0,
    "evaluation.num_retrieved": 2,
    "evaluation.image_samples": 10,
    "evaluation.caption_samples": 32,
    "vqgan.model.resolution": 256,
    "vqgan.model.tokens_per_image": 1024,
    "vqgan.model.n_embed": 8192,
    "clip.checkpoint": "openai/clip-vit-large-patch14",
    "clip.model.projection_dim": 768,
    "clip.model.text_config.hidden_size": 768,
    "clip.model.text_config.num_hidden_layers": 12,
    "clip.model.text_config.num_attention_heads": 12,
    "clip.model.text_config.max_position_embeddings": 77,
    "clip.model.vision_config.hidden_size": 1024,
    "clip.model.vision_config.num_hidden_layers": 24,
    "clip.model.vision_config.num_attention_heads": 16,
    "clip.model.vision_config.image_size": 224,
    "clip.model.vision_config.patch_size": 14,
    "compare_with_cm3": True,
    "cluster.documents": 150_000_000,
    "cluster.hosts": 32,
    "cluster.gpus": 8,  # 256 in all
    "cluster.gpu": "A100",
}


@pytest.mark.parametrize("path", PAPER)
def test_the_papers_numbers(path: str, paper: Experiment):
    value = paper
    for name in path.split("."):
        value = getattr(value, name)
    assert value == PAPER[path]


def test_a_step_of_the_paper_has_as_many_tokens_in_longer_rows(paper: Experiment):
    """256 GPUs with 16 sequences of 4,096 each; every shard of the batch has whole rows."""
    batches, gpus = paper.batches, paper.cluster.hosts * paper.cluster.gpus
    assert batches.rows * batches.row == 256 * 16 * 4096
    assert batches.row == 16_384
    assert (paper.mesh.data, paper.mesh.tensor) == (-1, 1)
    assert batches.rows % gpus == 0


def test_the_paper_searches_its_training_documents_whole(paper: Experiment):
    """The paper uses FAISS Flat, which is the same search. The memory is LAION alone, and COCO is held out."""
    assert isinstance(paper.retriever, Exact)
    assert paper.retriever.num_neighbors >= paper.selection.depth >= paper.batches.candidates >= 2
    assert paper.data.sources() == {
        "train": WebDataset("laion"),
        "validation": WebDataset("laion-validation"),
        "test": WebDataset("coco"),
    }


def test_the_papers_learning_rate_rises_for_1500_steps_and_falls_linearly_to_0(paper: Experiment):
    steps = paper.training.steps
    rate = paper.optimizer.schedule(steps)
    middle = 1500 + (steps - 1500) // 2
    for step, expected in ((0, 0.0), (750, 5e-5), (1500, 1e-4), (middle, 5e-5), (steps, 0.0)):
        assert float(rate(step)) == pytest.approx(expected, abs=1e-9)


def test_the_papers_model_has_2_7_billion_parameters_and_room_for_three_documents(paper: Experiment):
    """2.52 in 32 layers of 4 x 2560^2 in attention and 2 x 2560 x 10240 in the MLP; the rest in embeddings."""
    images = paper.vqgan.model.n_embed
    model = paper.model.build(paper.text.vocab_size + images, paper.batches.context_length, 1024)
    shapes = nn.unbox(jax.eval_shape(initializer(model), jax.random.key(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layers = 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    embeddings = (50_272 + 8192 + 4096 + 1024) * 2560  # of ids, positions, and offsets in an image
    assert parameters == pytest.approx(layers + embeddings, rel=1e-3)  # norms and biases are left out
    assert 2.6e9 < parameters < 2.8e9
    caption, markup = 64, 16
    assert 3 * (paper.vqgan.model.tokens_per_image + caption + markup) <= paper.batches.context_length


# Layers, width, heads, learning rate (arXiv 2205.01068, table 1; that of 2.7B is the paper's), parameters.
SIZES = {
    "125m": (12, 768, 12, 6e-4, 125e6),
    "350m": (24, 1024, 16, 3e-4, 350e6),
    "1_3b": (24, 2048, 32, 2e-4, 1.3e9),
    "2_7b": (32, 2560, 32, 1e-4, 2.7e9),
    "7b": (32, 4096, 32, 1.2e-4, 6.7e9),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_are_those_of_opt_with_the_recipe_of_the_paper(size: str, paper: Experiment):
    """All but the widths, the learning rate and the mesh is that of 2.7B."""
    experiment = load_config_module(str(CONFIGS / f"ra_cm3_{size}.py")).get_config()
    layers, embed, heads, peak_lr, parameters = SIZES[size]
    model = replace(paper.model, num_layers=layers, embed=embed, num_heads=heads, mlp=4 * embed)
    optimizer = replace(paper.optimizer, peak_lr=peak_lr)
    mesh = experiment.mesh
    assert experiment == replace(paper, name=f"ra_cm3_{size}", model=model, optimizer=optimizer, mesh=mesh)
    assert 256 % (mesh.fsdp * mesh.tensor) == 0
    # the rest are 4,096 positions in place of 2,048, 8,192 codes and 1,024 offsets
    built = model.build(paper.text.vocab_size + 8192, paper.batches.context_length, 1024)
    shapes = nn.unbox(jax.eval_shape(initializer(built), jax.random.key(0)))
    more = (2048 + 8192 + 1024) * embed
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) - more == pytest.approx(parameters, rel=0.06)


@pytest.mark.slow
def test_every_size_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for size in SIZES:
        run(["plan", f"ra_cm3_{size}", "--workdir", str(tmp_path / size)])
        assert "150,000,000" in capsys.readouterr().out.replace(" ", "")


def test_the_shipped_configs_have_the_names_of_their_files():
    names = set(shipped_configs())
    assert names == {"emoji_captions", "quickstart", *(f"ra_cm3_{size}" for size in SIZES)}
    assert {load_config_module(name).get_config().name for name in names} == names


def test_the_quickstart_asks_for_entities_that_only_the_memory_shows(tmp_path: Path):
    """Validation asks for the training entities, tuning for others than test. A seed draws all splits from one other
    world."""
    module = load_config_module("quickstart")
    data = module.get_config().data
    shown = {}
    for split, source in data.sources().items():
        documents = (document for shard in source.shards(tmp_path) for document in source.read(tmp_path, shard))
        shown[split] = {document.metadata[data.entity_field] for document in documents}
    assert shown["test"] | shown["tuning"] == shown["memory"]
    assert not shown["test"] & shown["tuning"]
    assert shown["validation"] == shown["train"]
    assert not shown["train"] & shown["memory"]
    assert {split: len(entities) for split, entities in shown.items()} == {
        "train": 400,
        "memory": 80,
        "validation": 400,
        "tuning": 40,
        "test": 40,
    }
    assert [data.role(split) for split in data.sources()] == ["train", "memory", *["held out"] * 3]
    assert data.fit_on == ("train", "memory")
    other = module.get_config(seed=3)
    assert other.seed == 3
    assert {source.seed for source in other.data.sources().values()} == {3}
    assert other.data.memory == {"memory": replace(other.data.train, split="memory")}


def test_emoji_captions_asks_for_what_only_the_memory_shows():
    experiment = load_config_module("emoji_captions").get_config()
    assert experiment.data.sources() == {
        "train": WebDataset("train"),
        "unseen": WebDataset("unseen-memory"),
        "validation": WebDataset("validation"),
        "test": WebDataset("unseen-test"),
    }
    assert experiment.data.role("unseen") == "memory"
    assert experiment.data.entity_field == "concept"
    assert experiment.clip.subject_field == "concept"


@pytest.mark.parametrize(("name", "alpha"), [("quickstart", 0.5), ("emoji_captions", 1.0)])
def test_the_small_configs_differ_from_the_paper_in_size_and_alpha_alone(name: str, alpha: float):
    """The objective, K and the comparison are the paper's, so that a small run tests the large one. Runs as short as
    these train on retrieved documents more."""
    experiment = load_config_module(name).get_config()
    assert experiment.batches.num_retrieved == (0, 1, 2)
    assert experiment.batches.retrieved_weight == alpha
    assert experiment.batches.masking.preset == "ra_cm3"
    assert experiment.evaluation.num_retrieved == 2
    assert experiment.compare_with_cm3
    assert experiment.evaluation.control
    assert isinstance(experiment.retriever, Scann)
    assert experiment.optimizer.b2 == 0.98
    assert experiment.optimizer.clip_norm == 1.0
    assert experiment.optimizer.warmup_steps < experiment.training.steps / 2
