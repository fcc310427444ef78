"""The recipe of each artifact: the part of the config and the inputs that determine its content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rac3.artifacts.recipe import Recipe
from rac3.clip.encoder import Encoder
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.linear import LinearConfig
from rac3.clip.published import checkpoint_identity
from rac3.config import InputError, canonical
from rac3.documents.coco import Coco
from rac3.documents.document import Stored
from rac3.documents.store import FORMAT
from rac3.evaluation.features import weights_file
from rac3.experiment import Experiment, Split
from rac3.generation.tasks.classify import Scored
from rac3.model.exchange import identity
from rac3.retrieval.retriever import search_only_fields
from rac3.tokens.text import tokenizer_identity
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.published import checkpoint_files
from rac3.weights.checkpoint_files import content_identity
from rac3.weights.fitting import FitConfig

OWN = "object"  # in the recipe of an encoder that the user's config defines; it has no artifact


def source_identity(experiment: Experiment, split: Split) -> dict[str, Any]:
    """What the documents of a split depend on: the source, its folder, shards and files, and the filter."""
    data = experiment.data
    source = data.memory[split] if split in data.memory else data.sources()[split]  # a withdrawn part was fitted on
    data_dir = str(Path(experiment.data_dir).resolve()) if experiment.data_dir else ""
    shards = list(source.shards(Path(experiment.data_dir)))
    found = {
        "source": canonical(source),
        "data_dir": data_dir,
        "shards": shards,
        "filter": canonical(experiment.filter),
    }
    if experiment.framing != "crop":
        found["framing"] = experiment.framing
    if isinstance(source, Stored):
        found["files"] = [_stamp(path) for path in source.files(Path(experiment.data_dir))]
    return found


def _stamp(path: Path) -> list[Any]:
    """What tells a file from another that has its name later: its size, and its time of change in nanoseconds."""
    if not path.exists():  # a dangling link, say: the source has a word for it
        return [path.name]
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def fitting_data(experiment: Experiment) -> list[dict[str, Any]]:
    """The documents that encoders are fitted on."""
    return [source_identity(experiment, split) for split in experiment.data.fit_on]


def text(experiment: Experiment) -> Recipe:
    if experiment.text.checkpoint is not None:
        return Recipe("text", {"checkpoint": tokenizer_identity(experiment.text.checkpoint)})
    config = {
        "text": experiment.text,
        "data": fitting_data(experiment),
        "max_documents": text_documents(experiment),
    }
    return Recipe("text", config)


def text_documents(experiment: Experiment) -> int:
    """The text tokenizer is fitted on at most this many documents: as many as the encoder that reads more of them."""
    fitted = (each for each in (experiment.vqgan, experiment.clip) if isinstance(each, FrozenVQGAN | FrozenCLIP))
    return max((each.fit.max_documents for each in fitted), default=FitConfig().max_documents)


def vqgan(experiment: Experiment) -> Recipe:
    """A checkpoint's recipe holds its path, its resolution, and what its files are; no documents.

    Raises:
      InputError: the checkpoint, or a file of it, does not exist; or weights of the perceptual loss don't.
    """
    config = experiment.vqgan
    if not isinstance(config, FrozenVQGAN):
        return Recipe("vqgan", {OWN: config})
    if config.checkpoint is not None:
        files = checkpoint_files(Path(config.checkpoint))
        content = content_identity([*files.configs, *filter(None, [files.index]), *files.weights])
        where = {"checkpoint": Path(config.checkpoint).resolve(), "resolution": config.resolution, "files": content}
        return Recipe("vqgan", where)
    fitted: dict[str, Any] = {"vqgan": _fitted(config), "data": fitting_data(experiment), "seed": experiment.seed}
    if config.objective.perceptual.weights:
        fitted["perceptual"] = [content_identity([path]) for path in config.objective.perceptual.files()]
    return Recipe("vqgan", fitted)


def clip(experiment: Experiment) -> Recipe:
    config = experiment.clip
    if not isinstance(config, FrozenCLIP):
        return Recipe("clip", {OWN: config})
    if config.checkpoint is not None:
        return Recipe("clip", {"checkpoint": checkpoint_identity(config.checkpoint)})
    fitted = {"clip": _fitted(config), "data": fitting_data(experiment), "seed": experiment.seed}
    if config.tokenizer.checkpoint is not None:
        fitted["tokenizer"] = tokenizer_identity(config.tokenizer.checkpoint)
    return Recipe("clip", fitted)


def _fitted(config: FrozenVQGAN | FrozenCLIP) -> dict[str, Any]:
    """What decides the parameters of a fitted encoder: everything but how it is run later."""
    idle = {"dtype"} | ({"image_crop"} if isinstance(config.model, LinearConfig) else set())
    return {name: value for name, value in canonical(config).items() if name not in idle}


def _dtype(config: FrozenVQGAN | FrozenCLIP | ImageTokenizer | Encoder) -> str | None:
    """The compute dtype of a built-in encoder; one that the user's config defines keeps such settings in its fields."""
    return config.dtype if isinstance(config, FrozenVQGAN | FrozenCLIP) else None


def documents(experiment: Experiment, split: Split) -> Recipe:
    config = {
        "format": FORMAT,
        "data": source_identity(experiment, split),
        "max_text_tokens": experiment.max_text_tokens,
        "dtype": _dtype(experiment.vqgan),
    }
    return Recipe("documents", config, {"text": text(experiment), "vqgan": vqgan(experiment)})


def embeddings(experiment: Experiment, split: Split) -> Recipe:
    """Of the document vectors, which are retrieved."""
    return Recipe("embeddings", _embedding(experiment), _embedded(experiment, split))


def queries(experiment: Experiment, split: Split) -> Recipe:
    """Of the query vectors, which may change without those of the documents."""
    config = _embedding(experiment)
    if split == "train":
        dropout = {"query_dropout": experiment.query_dropout, "num_views": experiment.num_views}
        config |= {**dropout, "seed": experiment.seed}
    return Recipe("queries", config, _embedded(experiment, split))


def _embedding(experiment: Experiment) -> dict[str, Any]:
    return {
        "dtype": _dtype(experiment.clip),
        "stored": experiment.embedding_dtype,
        "documents_per_shard": experiment.documents_per_shard,
    }


def _embedded(experiment: Experiment, split: Split) -> dict[str, Recipe]:
    return {"documents": documents(experiment, split), "clip": clip(experiment)}


def index(experiment: Experiment, split: Split) -> Recipe:
    inputs = {"embeddings": embeddings(experiment, split)}
    only_searched = search_only_fields(experiment.retriever)
    built = {name: value for name, value in canonical(experiment.retriever).items() if name not in only_searched}
    return Recipe("index", {"retriever": built}, inputs)


def neighbors(experiment: Experiment, split: Split) -> Recipe:
    inputs = {f"index {part}": index(experiment, part) for part in experiment.data.memory_splits(split)}
    inputs["queries"] = queries(experiment, split)
    config = {
        "retriever": experiment.retriever,
        "selection": experiment.selection,
        "training": split == "train",
        "takedowns": takedown_keys(experiment),
    }
    return Recipe("neighbors", config, inputs)


def takedown_keys(experiment: Experiment) -> list[str]:
    """The keys that `takedowns` names, sorted; without the byte order marks that some editors put before them.

    Raises:
      InputError: there is no such file, or it is not UTF-8.
    """
    if not experiment.takedowns:
        return []
    path = Path(experiment.takedowns)
    if not path.is_file():
        raise InputError(f"takedowns file {experiment.takedowns!r} does not exist; give a file of keys, one per line")
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"takedowns file {experiment.takedowns!r} is not UTF-8: {error.reason} at byte {error.start}; save it as "
            "UTF-8, so that no key is read wrongly"
        ) from error
    return sorted({line.strip("\ufeff \t\r\n\x0b\x0c") for line in lines} - {""})


def train(experiment: Experiment) -> Recipe:
    batches = canonical(experiment.batches)
    del batches["read_threads"]  # how fast, not what
    model = canonical(experiment.model)
    del model["remat"], model["attention"]  # time for memory; up to rounding
    if experiment.model.init_from:
        model["init_from"] = identity(experiment.model.init_from)
    config = {
        "model": model,
        "optimizer": experiment.optimizer,
        "batches": batches,
        "steps": experiment.training.steps,
        "seed": experiment.seed,
        "takedowns": takedown_keys(experiment),
    }
    inputs = {"documents": documents(experiment, "train")}
    if experiment.retrieves:
        inputs["neighbors"] = neighbors(experiment, "train")
    return Recipe("train", config, inputs)


def retrieval(experiment: Experiment) -> Recipe:
    """The evaluation of the retriever, without a model."""
    config = {"documents": experiment.evaluation.documents, "entity_field": experiment.data.entity_field}
    asking = [split for split in experiment.data.sources() if experiment.data.role(split) != "memory"]
    return Recipe("retrieval", config, {f"neighbors {split}": neighbors(experiment, split) for split in asking})


def reference(experiment: Experiment, split: Split) -> Recipe:
    """The features of the real pictures of a split, by the network that `evaluation.features` names."""
    config = {
        "features": _network(experiment),
        "documents": experiment.evaluation.documents,
        "clip_dtype": _dtype(experiment.clip),
    }
    return Recipe("reference", config, {"documents": documents(experiment, split), "clip": clip(experiment)})


def _network(experiment: Experiment) -> Any:
    """The network that `evaluation.features` names, by its weights."""
    return content_identity([weights_file(experiment.evaluation.features)])


def best(trained: Experiment) -> Recipe:
    """The choice among the kept checkpoints of a training."""
    inputs = {"documents tuning": documents(trained, "tuning"), "train": train(trained)}
    if trained.retrieves:
        inputs["neighbors tuning"] = neighbors(trained, "tuning")
    config = {
        "checkpoint_every": trained.training.checkpoint_every,
        "keep": trained.training.keep,
        "documents": trained.evaluation.documents,
        "num_retrieved": trained.evaluation.num_retrieved if trained.retrieves else 0,
    }
    return Recipe("best", config, inputs)


def evaluation(experiment: Experiment, trained: Experiment, step: int | None = None) -> Recipe:
    """The evaluation of the model of `trained` with the retriever of `experiment`. CLIP picks and scores the images.

    Args:
      step: of the model's checkpoint; None is the last.
    """
    inputs = {"train": train(trained), "clip": clip(experiment)}
    for split in experiment.data.sources():
        if split in ("validation", "test"):
            inputs[f"documents {split}"] = documents(experiment, split)
            if experiment.retrieves:
                inputs[f"neighbors {split}"] = neighbors(experiment, split)
            if experiment.evaluation.features:
                inputs[f"reference {split}"] = reference(experiment, split)
    settings = canonical(experiment.evaluation)
    del settings["control"], settings["features"]  # what else is evaluated; that of the references
    config = {
        "evaluation": settings,
        "clip_dtype": _dtype(experiment.clip),
        "entity_field": experiment.data.entity_field,
        "seed": experiment.seed,
        **_at(step),
    }
    return Recipe("evaluation", config, inputs)


def _at(step: int | None) -> dict[str, Any]:
    return {} if step is None else {"step": step}


def infilling(experiment: Experiment, trained: Experiment, step: int | None = None) -> Recipe:
    """The evaluation of infilling and editing, judged by pictures of the memory."""
    config = {**_drawn(experiment), **_compared(experiment), **_at(step)}
    return Recipe("infilling", config, {**_drawn_from(experiment, trained), **_memory(experiment)})


def drawings(experiment: Experiment, trained: Experiment, step: int | None = None) -> Recipe:
    """The pictures of held-out entities, whoever judges them. CLIP picks among the samples."""
    config = {
        **_drawn(experiment),
        "samples": experiment.evaluation.image_samples,
        "documents": experiment.evaluation.documents,
        "clip_dtype": _dtype(experiment.clip),
        "entity_field": experiment.data.entity_field,
        "seed": experiment.seed,
        **_at(step),
    }
    return Recipe("drawings", config, _drawn_from(experiment, trained))


def knowledge(experiment: Experiment, drawn: Mapping[str, Recipe]) -> Recipe:
    """The judgement of these drawings, and of what is compared with them, by pictures of the memory or by the source.

    Args:
      drawn: by the name of the model.
    """
    config = {"num_retrieved": experiment.evaluation.num_retrieved, **_compared(experiment)}
    if experiment.evaluation.features:
        config["features"] = _network(experiment)
    inputs = {f"drawings {name}": recipe for name, recipe in drawn.items()}
    return Recipe("knowledge", config, {**inputs, **_memory(experiment)})


def _drawn(experiment: Experiment) -> dict[str, Any]:
    """How pictures are drawn."""
    return {
        "num_retrieved": experiment.evaluation.num_retrieved,
        "sampling": experiment.evaluation.image_sampling,
    }


def _drawn_from(experiment: Experiment, trained: Experiment) -> dict[str, Recipe]:
    """What an evaluation reads, but no real pictures to compare with."""
    inputs = evaluation(experiment, trained).inputs
    return {name: recipe for name, recipe in inputs.items() if recipe.stage != "reference"}


def few_shot(experiment: Experiment, trained: Experiment, step: int | None = None) -> Recipe:
    """The evaluation of few-shot classification, whose demonstrations are documents of the memory."""
    held_out = [split for split in experiment.data.sources() if split in ("validation", "test")]
    inputs = {f"documents {split}": documents(experiment, split) for split in held_out}
    inputs |= {"train": train(trained), "clip": clip(experiment), **_memory(experiment)}
    scored = {"scored": [*get_args(Scored)]}
    return Recipe("few_shot", {**_compared(experiment), **_at(step), **scored}, inputs)


def coco(experiment: Experiment, trained: Experiment, step: int | None = None) -> Recipe:
    """The evaluation on MS-COCO: what `evaluation` depends on, less the entities and splits of other sources."""
    drawing = evaluation(experiment, trained, step)
    config = {name: value for name, value in drawing.config.items() if name != "entity_field"}
    others = [split for split, source in experiment.data.sources().items() if not isinstance(source, Coco)]
    inputs = {name: recipe for name, recipe in drawing.inputs.items() if name.partition(" ")[2] not in others}
    return Recipe("coco", config, inputs)


def _compared(experiment: Experiment) -> dict[str, Any]:
    """How held-out documents are compared with those of the memory that show an entity."""
    return {
        "documents": experiment.evaluation.documents,
        "clip_dtype": _dtype(experiment.clip),
        "entity_field": experiment.data.entity_field,
        "takedowns": takedown_keys(experiment),
        "seed": experiment.seed,
    }


def _memory(experiment: Experiment) -> dict[str, Recipe]:
    """The documents that held-out ones may be compared with."""
    return {f"documents {split}": documents(experiment, split) for split in experiment.data.memory_splits("test")}
