"""The recipe of each artifact: which part of the config and which inputs decide its content."""

from pathlib import Path
from typing import Any

from rac3.artifacts.recipe import Recipe
from rac3.clip.checkpoints import checkpoint_identity
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, canonical
from rac3.experiment import Experiment, Split
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.retriever import search_only_fields
from rac3.tokens.text import tokenizer_identity
from rac3.vqgan.files import checkpoint_files
from rac3.vqgan.frozen import FrozenVQGAN


def source_identity(experiment: Experiment, split: Split) -> dict[str, Any]:
    """What a split's documents depend on: its source, the folder it reads, its shards, and the filter."""
    data = experiment.data
    source = data.memory[split] if split in data.memory else data.sources()[split]  # a withdrawn part was fitted on
    data_dir = str(Path(experiment.data_dir).resolve()) if experiment.data_dir else ""
    shards = list(source.shards(Path(experiment.data_dir)))
    return {"source": canonical(source), "data_dir": data_dir, "shards": shards, "filter": canonical(experiment.filter)}


def fitting_data(experiment: Experiment) -> list[dict[str, Any]]:
    """The documents that encoders are fitted on."""
    return [source_identity(experiment, split) for split in experiment.data.fit_on]


def text(experiment: Experiment) -> Recipe:
    if experiment.text.checkpoint is not None:
        return Recipe("text", {"checkpoint": tokenizer_identity(experiment.text.checkpoint)}, {})
    config = {
        "text": experiment.text,
        "data": fitting_data(experiment),
        "max_documents": text_documents(experiment),
    }
    return Recipe("text", config, {})


def text_documents(experiment: Experiment) -> int:
    """The text tokenizer is fitted on at most this many documents: as many as the encoder that reads more of them."""
    return max(experiment.vqgan.fit.max_documents, experiment.clip.fit.max_documents)


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


def _fitted(encoder: FrozenVQGAN | FrozenCLIP) -> dict[str, Any]:
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
    """Of the vectors of documents, which are retrieved."""
    return Recipe("embeddings", _embedding(experiment), _embedded(experiment, split))


def queries(experiment: Experiment, split: Split) -> Recipe:
    """Of the vectors of queries: what is asked for has no part in what is retrieved, and may change without it."""
    config = _embedding(experiment)
    if split == "train":
        dropout = {"query_dropout": experiment.query_dropout, "num_views": experiment.num_views}
        config |= {**dropout, "seed": experiment.seed}
    return Recipe("queries", config, _embedded(experiment, split))


def _embedding(experiment: Experiment) -> dict[str, Any]:
    return {
        "dtype": experiment.clip.dtype,
        "stored": experiment.embedding_dtype,
        "documents_per_shard": experiment.documents_per_shard,
    }


def _embedded(experiment: Experiment, split: Split) -> dict[str, str]:
    return {"documents": documents(experiment, split).fingerprint, "clip": clip(experiment).fingerprint}


def index(experiment: Experiment, split: Split) -> Recipe:
    inputs = {"embeddings": embeddings(experiment, split).fingerprint}
    only_searched = search_only_fields(experiment.retriever)
    built = {name: value for name, value in canonical(experiment.retriever).items() if name not in only_searched}
    return Recipe("index", {"retriever": built}, inputs)


def memory_splits(experiment: Experiment, split: Split) -> list[Split]:
    """The parts of the memory that queries of `split` search: those of training, the training documents alone."""
    data = experiment.data
    return ["train"] if split == "train" else [part for part in data.sources() if data.role(part) != "held out"]


def neighbors(experiment: Experiment, split: Split) -> Recipe:
    inputs = {f"index {part}": index(experiment, part).fingerprint for part in memory_splits(experiment, split)}
    inputs["queries"] = queries(experiment, split).fingerprint
    config = {
        "retriever": experiment.retriever,
        "selection": experiment.selection,
        "training": split == "train",
        "takedowns": takedown_keys(experiment),
    }
    return Recipe("neighbors", config, inputs)


def takedown_keys(experiment: Experiment) -> list[str]:
    """The keys that `takedowns` names, sorted.

    Raises:
      InputError: there is no such file.
    """
    if not experiment.takedowns:
        return []
    path = Path(experiment.takedowns)
    if not path.is_file():
        raise InputError(f"takedowns file {experiment.takedowns!r} does not exist; give a file of keys, one per line")
    return sorted({line.strip() for line in path.read_text().splitlines()} - {""})


def retrieves(experiment: Experiment) -> bool:
    """False for the vanilla CM3."""
    return not isinstance(experiment.retriever, NoRetriever)


def train(experiment: Experiment) -> Recipe:
    batches = canonical(experiment.batches)
    del batches["read_threads"]  # how fast, not what
    model = canonical(experiment.model)
    del model["remat"]  # time for memory
    config = {
        "model": model,
        "optimizer": experiment.optimizer,
        "batches": batches,
        "steps": experiment.training.steps,
        "seed": experiment.seed,
        "takedowns": takedown_keys(experiment),
    }
    inputs = {"documents": documents(experiment, "train").fingerprint}
    if retrieves(experiment):
        inputs["neighbors"] = neighbors(experiment, "train").fingerprint
    return Recipe("train", config, inputs)


def retrieval(experiment: Experiment) -> Recipe:
    """The evaluation of what is retrieved, without a model."""
    config = {"documents": experiment.evaluation.documents, "entity_field": experiment.data.entity_field}
    asking = [split for split in experiment.data.sources() if experiment.data.role(split) != "memory"]
    return Recipe(
        "retrieval", config, {f"neighbors {split}": neighbors(experiment, split).fingerprint for split in asking}
    )


def evaluation(experiment: Experiment, trained: Experiment) -> Recipe:
    """The evaluation of the model of `trained` with the retriever of `experiment`. CLIP picks and scores the images."""
    inputs = {"train": train(trained).fingerprint, "clip": clip(experiment).fingerprint}
    for split in experiment.data.sources():
        if split in ("validation", "test"):
            inputs[f"documents {split}"] = documents(experiment, split).fingerprint
            if retrieves(experiment):
                inputs[f"neighbors {split}"] = neighbors(experiment, split).fingerprint
    settings = canonical(experiment.evaluation)
    del settings["control"]  # what else is evaluated
    config = {
        "evaluation": settings,
        "clip_dtype": experiment.clip.dtype,
        "entity_field": experiment.data.entity_field,
        "seed": experiment.seed,
    }
    return Recipe("evaluation", config, inputs)
