"""The recipe of each artifact: which part of the config and which inputs decide its content."""

from pathlib import Path
from typing import Any

from rac3.artifacts import Recipe
from rac3.config import canonical
from rac3.experiment import Experiment, ImageTextEncoder, ImageTokenizer, Split
from rac3.retrieval.clip_checkpoints import checkpoint_identity
from rac3.retrieval.controls import NoRetriever
from rac3.tokens.text import tokenizer_identity
from rac3.tokens.vqgan_files import checkpoint_files


def source_identity(experiment: Experiment, split: Split) -> dict[str, Any]:
    """What a split's documents depend on: its source, the folder it reads, its shards, and the filter."""
    source = experiment.data.sources()[split]
    data_dir = str(Path(experiment.data_dir).resolve()) if experiment.data_dir else ""
    shards = list(source.shards(Path(experiment.data_dir)))
    return {"source": canonical(source), "data_dir": data_dir, "shards": shards, "filter": canonical(experiment.filter)}


def fitting_data(experiment: Experiment) -> list[dict[str, Any]]:
    """The documents that encoders are fitted on: training and memory, never held out."""
    splits: list[Split] = [split for split in experiment.data.sources() if split in ("train", "memory")]
    return [source_identity(experiment, split) for split in splits]


def text(experiment: Experiment) -> Recipe:
    if experiment.text.checkpoint is not None:
        return Recipe("text", {"checkpoint": tokenizer_identity(experiment.text.checkpoint)}, {})
    return Recipe("text", {"text": experiment.text, "data": fitting_data(experiment)}, {})


def vqgan(experiment: Experiment) -> Recipe:
    """Of a checkpoint: its path and resolution, and the names and sizes of its files; no documents are looked at.

    Raises:
      InputError: the checkpoint, or a file of it, does not exist; or weights of the perceptual loss don't.
    """
    checkpoint = experiment.vqgan.checkpoint
    if checkpoint is not None:
        files = checkpoint_files(Path(checkpoint))
        sizes = [[path.name, path.stat().st_size] for path in (*files.configs, *files.weights)]
        where = {"checkpoint": Path(checkpoint).resolve(), "resolution": experiment.vqgan.resolution, "files": sizes}
        return Recipe("vqgan", where, {})
    config: dict[str, Any] = {
        "vqgan": _fitted(experiment.vqgan),
        "data": fitting_data(experiment),
        "seed": experiment.seed,
    }
    if experiment.vqgan.objective.perceptual.weights:
        config["perceptual"] = [path.stat().st_size for path in experiment.vqgan.objective.perceptual.files()]
    return Recipe("vqgan", config, {})


def clip(experiment: Experiment) -> Recipe:
    if experiment.clip.checkpoint is not None:
        return Recipe("clip", {"checkpoint": checkpoint_identity(experiment.clip.checkpoint)}, {})
    config = {"clip": _fitted(experiment.clip), "data": fitting_data(experiment), "seed": experiment.seed}
    if experiment.clip.tokenizer.checkpoint is not None:
        config["tokenizer"] = tokenizer_identity(experiment.clip.tokenizer.checkpoint)
    return Recipe("clip", config, {})


def _fitted(encoder: ImageTokenizer | ImageTextEncoder) -> dict[str, Any]:
    """What decides the parameters of a fitted encoder: all but how it is run later."""
    return {name: value for name, value in canonical(encoder).items() if name != "dtype"}


def documents(experiment: Experiment, split: Split) -> Recipe:
    config = {
        "data": source_identity(experiment, split),
        "max_text_tokens": experiment.max_text_tokens,
        "dtype": experiment.vqgan.dtype,
    }
    return Recipe("documents", config, {"text": text(experiment).fingerprint, "vqgan": vqgan(experiment).fingerprint})


def embeddings(experiment: Experiment, split: Split) -> Recipe:
    config: dict[str, Any] = {
        "split": split,
        "dtype": experiment.clip.dtype,
        "stored": experiment.embedding_dtype,
        "documents_per_shard": experiment.documents_per_shard,
    }
    if split == "train":
        config |= {"query_dropout": experiment.query_dropout, "seed": experiment.seed}
    inputs = {"documents": documents(experiment, split).fingerprint, "clip": clip(experiment).fingerprint}
    return Recipe("embeddings", config, inputs)


def index(experiment: Experiment, split: Split) -> Recipe:
    inputs = {"embeddings": embeddings(experiment, split).fingerprint}
    return Recipe("index", {"retriever": experiment.retriever}, inputs)


def memory_splits(experiment: Experiment, split: Split) -> list[Split]:
    """The parts of the memory that queries of `split` search: training never sees the `memory` split."""
    wanted = ("train",) if split == "train" else ("train", "memory")
    return [part for part in experiment.data.sources() if part in wanted]


def neighbors(experiment: Experiment, split: Split) -> Recipe:
    inputs = {f"index {part}": index(experiment, part).fingerprint for part in memory_splits(experiment, split)}
    inputs["queries"] = embeddings(experiment, split).fingerprint
    return Recipe("neighbors", {"selection": experiment.selection, "training": split == "train"}, inputs)


def retrieves(experiment: Experiment) -> bool:
    """False for the vanilla CM3."""
    return not isinstance(experiment.retriever, NoRetriever)


def train(experiment: Experiment) -> Recipe:
    batches = canonical(experiment.batches)
    del batches["read_threads"]  # how fast, not what
    config = {
        "model": experiment.model,
        "optimizer": experiment.optimizer,
        "batches": batches,
        "steps": experiment.training.steps,
        "seed": experiment.seed,
    }
    inputs = {"documents": documents(experiment, "train").fingerprint}
    if retrieves(experiment):
        inputs["neighbors"] = neighbors(experiment, "train").fingerprint
    return Recipe("train", config, inputs)


def evaluation(experiment: Experiment, trained: Experiment) -> Recipe:
    """The evaluation of the model of `trained` with the retriever of `experiment`."""
    inputs = {"train": train(trained).fingerprint}
    for split in experiment.data.sources():
        if split in ("validation", "test"):
            inputs[f"documents {split}"] = documents(experiment, split).fingerprint
            if retrieves(experiment):
                inputs[f"neighbors {split}"] = neighbors(experiment, split).fingerprint
    config = {
        "evaluation": experiment.evaluation,
        "entity_field": experiment.data.entity_field,
        "seed": experiment.seed,
    }
    return Recipe("evaluation", config, inputs)
