"""Train: pre-retrieved batches -> a CM3 Transformer. Reads artifacts only; no retriever runs here."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.batches.groups import GroupBuilder
from rac3.batches.loader import BatchStream, StreamState
from rac3.experiment import Experiment
from rac3.model.transformer import Transformer
from rac3.stages.embed import open_documents
from rac3.stages.encoders import open_text, open_vqgan
from rac3.stages.ingest import vocabulary_of
from rac3.stages.memory import withdrawn_rows
from rac3.stages.retrieve import read_neighbors
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.loop import training_loop
from rac3.training.state import new_state
from rac3.training.step import make_train_step


def model_name(experiment: Experiment) -> str:
    return "ra_cm3" if recipes.retrieves(experiment) else "cm3"


def build_model(experiment: Experiment, vocabulary: Vocabulary, tokens_per_image: int) -> Transformer:
    return experiment.model.build(
        vocabulary.padded_size,
        experiment.batches.context_length,
        max(tokens_per_image, experiment.max_text_tokens),
    )


def initializer(model: Transformer) -> Any:
    """Key -> parameters."""

    def init(key: Array) -> PyTree:
        ids = jnp.zeros((1, 2), jnp.int32)
        return model.init(key, ids, ids, ids, ids)

    return init


def train(experiment: Experiment, workdir: Workdir) -> None:
    """Trains the model of the experiment, unless that is done; goes on from its newest checkpoint.

    Raises:
      InputError: a context too short for one document, a mesh that does not divide the devices, a checkpoint of
        another model.
    """
    recipe = recipes.train(experiment)
    if workdir.find(recipe) is not None:
        return
    mesh = experiment.mesh.build()
    codec = open_vqgan(experiment, workdir)
    vocabulary = vocabulary_of(open_text(experiment, workdir), codec)
    stream = training_stream(experiment, workdir, vocabulary)

    def batches(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        return stream.batches(StreamState(*position))

    model = build_model(experiment, vocabulary, codec.tokens_per_image)
    optimizer = experiment.optimizer.build(experiment.training.steps)
    with workdir.write(recipe) as draft:
        new = new_state(initializer(model), optimizer, experiment.seed, mesh)
        draft.counts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(new.abstract.params))
        step = make_train_step(model, optimizer, experiment.training.loss_chunk)
        label = f"train {model_name(experiment)}"
        training_loop(label, experiment.training, new, step, batches, draft.folder, mesh)


def training_stream(experiment: Experiment, workdir: Workdir, vocabulary: Vocabulary) -> BatchStream:
    """This process's share of the batches that the experiment trains on."""
    config = experiment.batches
    documents = open_documents(experiment, workdir, "train")
    return BatchStream(
        config,
        experiment.seed,
        documents,
        read_neighbors(experiment, workdir, "train") if recipes.retrieves(experiment) else None,
        GroupBuilder(vocabulary, config.masking, config.retrieved_weight, config.retrieved),
        jax.process_count(),
        jax.process_index(),
        withdrawn_rows(experiment, documents, "train"),
    )


def open_params(experiment: Experiment, workdir: Workdir, model: Transformer) -> PyTree:
    """The parameters that `train` ended with, laid out over this machine's mesh."""
    folder = workdir.require(recipes.train(experiment), "rac3 train").folder
    like = experiment.mesh.build().abstract(jax.eval_shape(initializer(model), jax.random.key(0)))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    params = checkpoints.restore_params(like)
    checkpoints.close()
    return params
