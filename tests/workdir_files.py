"""The files of a finished workdir, and what reads each artifact, as the stages do."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rac3 import recipes
from rac3.answering import Model
from rac3.report.experiment import collect
from rac3.retrieval.retriever import Queries
from rac3.stages.evaluate import comparisons


def _documents(run: Model) -> object:
    store = run.documents("train")
    items = store.many(range(len(store)))
    names = ("lengths", "text_lengths", "key_hashes", "text_hashes", "image_hashes")
    return [(item.document, item.tokens) for item in items], [store.column(name)[:] for name in names]


def _index(run: Model) -> object:
    vector = np.eye(1, run.embeddings("train").shape[1], dtype=np.float32)
    return run.memory("train").retrieve(Queries(["a"], vector, [""]), np.full(1, -1))


READERS: dict[str, Callable[[Model], object]] = {
    "text": lambda run: run.tokenizer.encode("a"),
    "vqgan": lambda run: run.images.codebook_size,
    "clip": lambda run: run.encoder.width,
    "documents": _documents,
    "embeddings": lambda run: np.asarray(run.embeddings("train")[:]),
    "queries": lambda run: [np.asarray(run.queries("train", name)[:]) for name in ("text", "image")],
    "index": _index,
    "neighbors": lambda run: [np.asarray(run.neighbors("train", name)[:]) for name in ("ids", "scores")],
    "train": lambda run: run.training_metrics(),
    "best": lambda run: comparisons(run)["cm3_best"].step,
    "evaluation": collect,
}
"""What reads each artifact, as the stages do; what it gives, a changed file must not change."""

FILES = {
    "text": ("tokenizer.json", "tokenizer_config.json"),
    "vqgan": ("config.json", "params.safetensors", "metrics.jsonl"),
    "clip": (
        *("config.json", "images.json", "params.safetensors", "metrics.jsonl"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ),
    "documents": (
        *("000000.array_record", "000000.u2", "id_shards.npy", "id_starts.npy", "image_hashes.npy", "key_hashes.npy"),
        *("lengths.npy", "text_hashes.npy", "text_lengths.npy", "rejects.jsonl"),
    ),
    "embeddings": ("document/c/0/0", "document/zarr.json"),
    "queries": ("image/c/0/0", "image/zarr.json", "text/c/0/0", "text/zarr.json"),
    "index": ("dataset.npy", "scann_assets.pbtxt", "scann_config.pb"),
    "neighbors": ("ids/c/0/0/0", "ids/zarr.json", "scores/c/0/0/0", "scores/zarr.json"),
    "train": ("metrics.jsonl",),
    "best": ("metrics.json",),
    "evaluation": ("metrics.json", "test.json", "test.npy", "validation.json", "validation.npy"),
}
"""Every file of each artifact, besides its manifest, checkpoints and logs."""


def recipe_of(run: Model, stage: str) -> recipes.Recipe:
    if stage == "train":
        return run.training_recipe
    if stage == "evaluation":
        return run.evaluation_recipe
    if stage == "best":
        return recipes.best(run.experiment.vanilla())
    of = getattr(recipes, stage)
    return of(run.experiment) if stage in ("text", "vqgan", "clip") else of(run.experiment, "train")


def folder_of(run: Model, stage: str) -> Path:
    recipe = recipe_of(run, stage)
    return run.workdir.path / recipe.stage / recipe.fingerprint


def linked(source: Path, target: Path) -> Path:
    """A copy that shares the files, which must be replaced, not written over."""
    skipped = shutil.ignore_patterns("compiled", "*.lock")
    return shutil.copytree(source, target, copy_function=lambda a, b: os.link(a, b), ignore=skipped)
