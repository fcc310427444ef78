"""A run: what a workdir holds, opened.

    run = rac3.load("runs/quickstart")
    run.draw("a red fox").images[0]

Stages write artifacts and read those of earlier stages through a `Run`. Whoever opens a finished workdir, in a notebook
or for `rac3 generate`, has the same object.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Float, Int, PyTree, UInt8

from rac3 import recipes
from rac3.artifacts.arrays import Rows, Vectors
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import Artifact, Workdir, write_atomic
from rac3.batches.groups import GroupBuilder
from rac3.batches.loader import BatchStream
from rac3.batches.masking import Masking
from rac3.clip.encoder import Encoder
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, fingerprint, from_plain, load_config_module, to_plain
from rac3.documents.document import Document
from rac3.documents.store import DocumentStore, Keys, Texts, TokenizedDocument, hash64
from rac3.experiment import Experiment, Split
from rac3.generation.captions import generate_captions
from rac3.generation.engine import Engine
from rac3.generation.generator import Generator
from rac3.generation.images import generate_images
from rac3.generation.sampling import Sampling
from rac3.model.transformer import Transformer
from rac3.retrieval.memory import EmbeddingRows, MemoryPart
from rac3.retrieval.open_memory import IndexedPart, OpenMemory
from rac3.retrieval.retriever import Queries, Retriever
from rac3.tokens.html import Sequenced
from rac3.tokens.text import Tokenizer
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.metrics import read_metrics
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN

EXPERIMENT = "experiment.json"  # of a workdir: the experiment that it was made with
PROGRAMS = "compiled"  # the folder of compiled programs in a workdir
DOCUMENT = "document"  # the array of the vectors that are retrieved
PARTS = ("text", "image")  # of a document, each of which is a query (paper, section 3.2)
MARKUP = 8  # ids of a prompt at most, besides documents, text and image

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A retrieved document and its similarity to the query."""

    document: Document
    score: float
    tokens: TokenizedDocument


@dataclass(frozen=True)
class Drawn:
    """Images of a caption.

    Attributes:
      images: the one that CLIP likes best first.
      retrieved: the documents in context, best first.
      dropped: documents that were retrieved, but did not fit into the context with the others.
    """

    images: list[UInt8[np.ndarray, "height width 3"]]
    retrieved: list[Found]
    dropped: list[Found]


@dataclass(frozen=True)
class Captioned:
    """The caption of an image; `retrieved` and `dropped` as in `Drawn`."""

    text: str
    retrieved: list[Found]
    dropped: list[Found]


class Run:
    """A workdir and the experiment it was made with. Everything is opened when it is first asked for, and once.

    Args:
      trained: the experiment that the model was trained with, if it is another one: a retriever or takedowns that are
        named at inference are those of `experiment` alone.

    Raises:
      InputError: (of every member) the artifact is not made yet; the message has the command that makes it.
    """

    def __init__(self, experiment: Experiment, workdir: Workdir, trained: Experiment | None = None) -> None:
        self.experiment = experiment
        self.workdir = workdir
        self.trained = trained or experiment
        self._opened: dict[Any, Any] = {}  # by recipe; shared by runs that differ in how they retrieve
        self._recipes: dict[Any, Recipe] = {}
        self._lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """What is open stays where it is: another process opens it again."""
        return Run, (self.experiment, self.workdir, self.trained)

    def with_retriever(self, retriever: Retriever) -> "Run":
        """This run with another retriever at inference, its model unchanged. `rac3 index` makes what that needs."""
        return self.variant(replace(self.experiment, retriever=retriever), self.trained)

    def variant(self, experiment: Experiment, trained: Experiment) -> "Run":
        """A run of other experiments in the same workdir; what both have in common is opened once."""
        other = Run(experiment, self.workdir, trained)
        other._opened, other._lock = self._opened, self._lock
        return other

    # Recipes and artifacts.

    def recipe(self, of: Callable[..., Recipe], *arguments: Any) -> Recipe:
        """A recipe of `rac3.recipes` for this experiment, as it is now: sources and checkpoints are looked at once."""
        key = of, *arguments
        if key not in self._recipes:
            self._recipes[key] = of(self.experiment, *arguments)
        return self._recipes[key]

    def artifact(self, of: Callable[..., Recipe], *arguments: Any) -> Artifact:
        """The artifact of a recipe."""
        return self._require(self.recipe(of, *arguments))

    def _require(self, recipe: Recipe) -> Artifact:
        return self.workdir.require(recipe, recipes.COMMANDS[recipe.stage])

    def require_encoders(self, *of: Callable[..., Recipe]) -> None:
        """Raises InputError unless these exist; an encoder defined in the user's config needs no artifact."""
        for each in of:
            if recipes.OWN not in self.recipe(each).config:
                self.artifact(each)

    def _open(self, recipe: Recipe, opener: Callable[[Path], T], *how: Any) -> T:
        """`opener` of the artifact's folder, called once for each `how`."""
        folder = self._require(recipe).folder  # each time: a stage that is writing may read this only as an input
        with self._lock:
            key = recipe.fingerprint, *how
            if key not in self._opened:
                self._opened[key] = opener(folder)
            return self._opened[key]

    # The frozen models.

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to ids and back."""
        return self._open(self.recipe(recipes.text), self.experiment.text.load)

    @property
    def images(self) -> ImageTokenizer:
        """Pictures to codes and back."""
        vqgan = self.experiment.vqgan
        if not isinstance(vqgan, FrozenVQGAN):
            return vqgan
        return self._open(self.recipe(recipes.vqgan), vqgan.open, vqgan.dtype)

    @property
    def encoder(self) -> Encoder:
        """Texts and pictures to vectors of one space."""
        clip = self.experiment.clip
        if not isinstance(clip, FrozenCLIP):
            return clip
        return self._open(self.recipe(recipes.clip), clip.open, clip.dtype)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of texts and images together."""
        return Vocabulary(self.tokenizer.size, self.images.codebook_size)

    # Documents and what retrieval needs of them.

    def documents(self, split: Split) -> DocumentStore:
        """The ingested documents of a split."""
        return self._open(self.recipe(recipes.documents, split), DocumentStore)

    def embeddings(self, split: Split) -> EmbeddingRows:
        """The vectors of a part of the memory, float32 [documents, embed]."""
        return self._open(self.recipe(recipes.embeddings, split), _embeddings)

    def queries(self, split: Split, name: str = "text") -> Vectors:
        """The query vectors of one of `query_arrays`; zeros where a document lacks the part. Those of `train` have
        query dropout."""
        return Vectors(self.artifact(recipes.queries, split).folder / name)

    def query_arrays(self, split: Split) -> list[str]:
        """The arrays of query vectors of a split: for each view, one of each part."""
        views = range(self.experiment.num_views if split == "train" else 1)
        return [f"{part}-{view}" if view else part for view in views for part in PARTS]

    def neighbors(self, split: Split, name: str = "ids") -> Rows:
        """Global memory ids [documents, queries, depth] of each of `query_arrays`, -1 is none; or their `scores`."""
        return Rows(self.artifact(recipes.neighbors, split).folder / name)

    def memory(self, split: Split = "test") -> OpenMemory:
        """The memory that queries of `split` search."""
        experiment = self.experiment
        parts = [self._indexed_part(part) for part in experiment.data.memory_splits(split)]
        key = *map(id, parts), fingerprint([experiment.retriever, experiment.selection])
        with self._lock:
            if key not in self._opened:
                self._opened[key] = OpenMemory(parts, experiment.retriever, experiment.selection)
            return self._opened[key]

    def memory_part(self, split: Split) -> MemoryPart:
        """A part of the memory, for a retriever to index."""
        documents = self.documents(split)
        hashes = documents.column("text_hashes"), documents.column("image_hashes")
        vectors, withdrawn = self.embeddings(split), self.withdrawn_rows(split)
        return MemoryPart(split, vectors, Texts(documents), Keys(documents), hashes, withdrawn)

    def withdrawn_rows(self, split: Split) -> Int[np.ndarray, " rows"]:
        """The documents of a split that `takedowns` names, ascending."""
        keys = recipes.takedown_keys(self.experiment)
        own = {key.removeprefix(f"{split}:") for key in keys}
        if not own:
            return np.zeros(0, np.int64)
        documents = self.documents(split)
        hashes = np.array([hash64(key.encode()) for key in own], np.uint64)
        rows = np.flatnonzero(np.isin(documents.column("key_hashes"), hashes))
        found = [item.document.key for item in documents.many(rows.tolist())]
        return rows[[key in own for key in found]]

    def _indexed_part(self, split: Split) -> IndexedPart:
        takedowns = tuple(recipes.takedown_keys(self.experiment))
        return self._open(
            self.recipe(recipes.index, split),
            lambda folder: IndexedPart(self.memory_part(split), self.documents(split), folder),
            takedowns,
        )

    # The generator.

    @property
    def model(self) -> Transformer:
        experiment, images = self.experiment, self.images
        longest = max(images.tokens_per_image, experiment.max_text_tokens)
        batches = experiment.batches
        return experiment.model.build(self.vocabulary.padded_size, batches.context_length, longest, batches.max_groups)

    @property
    def params(self) -> PyTree:
        """The parameters that `train` ended with, laid out over this machine's mesh."""
        return self._open(self.training_recipe, self._restore)

    def _restore(self, folder: Path) -> PyTree:
        like = self.experiment.mesh.build().abstract(jax.eval_shape(initializer(self.model), jax.random.key(0)))
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        params = checkpoints.restore_params(like)
        checkpoints.close()
        return params

    @property
    def generator(self) -> Generator:
        return Generator(self.engine, self.images.tokens_per_image)

    @property
    def engine(self) -> Engine:
        """Continues prompts with the model that `train` ended with, over this machine's mesh."""

        def start(_: Path) -> Engine:
            return Engine(self.model, self.params, self.vocabulary, self.experiment.mesh.build())

        return self._open(self.training_recipe, start, "engine")

    @property
    def builder(self) -> GroupBuilder:
        """Builds sequences of whole documents, as prompts hold them."""
        return GroupBuilder(self.vocabulary, Masking("none"), 1.0, self.experiment.batches.retrieved)

    def training_stream(self, share: tuple[int, int] = (1, 0)) -> BatchStream:
        """The batches that the experiment trains on.

        Args:
          share: the number of shares of the rows of each batch, and the one that is read.
        """
        config, neighbors = self.experiment.batches, None
        if self.experiment.retrieves:
            neighbors = self.neighbors("train")
        return BatchStream(
            config,
            self.experiment.seed,
            self.documents("train"),
            neighbors,
            GroupBuilder(self.vocabulary, config.masking, config.retrieved_weight, config.retrieved),
            *share,
            self.withdrawn_rows("train"),
        )

    @property
    def training_recipe(self) -> Recipe:
        """Of the model, which may have been trained with another retriever than this run has."""
        return recipes.train(self.trained)

    @property
    def evaluation_recipe(self) -> Recipe:
        """Of the evaluation of that model with this run's retriever."""
        return recipes.evaluation(self.experiment, self.trained)

    def trained_model(self) -> Artifact:
        """The artifact of the model."""
        return self._require(self.training_recipe)

    def evaluation(self) -> Artifact:
        """The artifact of the evaluation."""
        return self._require(self.evaluation_recipe)

    def training_metrics(self) -> list[dict[str, int | float]]:
        """One record for each logged step of the training: `step`, `loss`, `loss/main/image` (nats per token), ..."""
        return read_metrics(self.trained_model().folder)

    # Prompts.

    def retrieve(self, text: str = "", image: UInt8[np.ndarray, "_ _ 3"] | None = None, k: int = 2) -> list[Found]:
        """The documents that a text, or an image, retrieves; best first, at most k that have something to show.

        Raises:
          InputError: neither a text nor an image, or both: a query is one part of a document (paper, section 3.4).
        """
        text = text.strip()  # as the texts of documents are
        if (text == "") == (image is None):
            raise InputError("the prompt has no text and no image, or both; give --prompt TEXT or --image FILE")
        if not self.experiment.retrieves or k == 0:
            return []
        vector: Float[np.ndarray, "1 embed"] = (
            self.encoder.embed_texts([text]) if image is None else self.encoder.embed_images([image])
        )
        memory, builder = self.memory(), self.builder
        selected = memory.retrieve(Queries([text or "image"], vector, [text]), np.array([-1]))
        found: list[Found] = []
        for number, score in zip(selected.ids[0].tolist(), selected.scores[0].tolist(), strict=True):
            if number >= 0 and len(found) < k:
                item = memory.document(number)
                if builder.shown(item.tokens) is not None:
                    found.append(Found(item.document, score, item))
        return found

    def draw(self, text: str, k: int = 2, samples: int = 4, seed: int = 0, sampling: Sampling | None = None) -> Drawn:
        """Images of a caption.

        Args:
          k: documents to retrieve.
          sampling: None is `evaluation.image_sampling` of the experiment.

        Raises:
          InputError: an empty caption, or one that leaves no room for an image.
        """
        text = text.strip()
        ids = self.tokenizer.encode(text)
        found = self.retrieve(text, k=k) if ids else []
        context, retrieved, dropped = self._context(found, self.images.tokens_per_image + len(ids))
        sampling = sampling or self.experiment.evaluation.image_sampling
        codes = generate_images(self.generator, [ids], [context], sampling, samples, seed)[0]
        pixels = self.images.decode(codes)
        scores = self.encoder.embed_images(list(pixels)) @ self.encoder.embed_texts([text])[0]
        return Drawn([pixels[i] for i in np.argsort(-scores)], retrieved, dropped)

    def caption(
        self,
        image: UInt8[np.ndarray, "_ _ 3"],
        k: int = 2,
        samples: int = 4,
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> Captioned:
        """The caption of lowest perplexity of an image; the arguments are those of `draw`."""
        settings, images = self.experiment.evaluation, self.images
        found = self.retrieve(image=image, k=k)
        context, retrieved, dropped = self._context(found, images.tokens_per_image + settings.max_caption_tokens)
        ids = generate_captions(
            self.generator,
            [images.encode([image])[0]],
            [context],
            sampling or settings.caption_sampling,
            samples,
            settings.max_caption_tokens,
            seed,
        )
        return Captioned(self.tokenizer.decode(ids[0].tolist()), retrieved, dropped)

    def _context(self, found: list[Found], main: int) -> tuple[list[Sequenced], list[Found], list[Found]]:
        """The sequences of the documents that fit next to `main` ids, those documents, and the others."""
        context = self.in_context([item.tokens for item in found], main)
        return context, found[: len(context)], found[len(context) :]

    def in_context(self, documents: Sequence[TokenizedDocument], main: int) -> list[Sequenced]:
        """The first of the documents, as far as the context has room for them next to `main` ids and markup."""
        room = self.model.max_positions - main - MARKUP
        kept: list[Sequenced] = []
        for sequence in self.builder.retrieved_sequences([item.tokens for item in documents]):
            room -= len(sequence.ids)
            if room < 0:
                break
            kept.append(sequence)
        return kept


def initializer(model: Transformer) -> Callable[[Array], PyTree]:
    """Key -> parameters."""

    def init(key: Array) -> PyTree:
        ids = jnp.zeros((1, 2), jnp.int32)
        return model.init(key, ids, ids, ids, ids)

    return init


def _embeddings(folder: Path) -> EmbeddingRows:
    """The mixed-modal vectors of a part of the memory: read when asked for, or now if they are small.

    Small is a sixteenth of this machine's memory, on which there may be a worker for each of 8 GPUs.
    """
    vectors = Vectors(folder / DOCUMENT)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return vectors[:] if 4 * math.prod(vectors.shape) <= machine // 16 else vectors


def keep_programs(workdir: Path) -> None:
    """Keeps compiled programs in the workdir, so that the next process finds them.

    A folder that `JAX_COMPILATION_CACHE_DIR` or `jax.config` names stays in use; nothing is kept where nothing can be
    written.
    """
    if jax.config.values["jax_compilation_cache_dir"] or not os.access(workdir, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / PROGRAMS))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # generation has many small programs
    compilation_cache.reset_cache()  # what was compiled before has settled that there is none


def describe(run: Run) -> None:
    """Writes the experiment into its workdir, for `load`: plain data, overrides included, relative paths resolved."""
    plain = {
        "arguments": run.workdir.arguments,
        "experiment": to_plain(_with_absolute_paths(run.experiment)),
    }
    write_atomic(run.workdir.path / EXPERIMENT, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """A notebook runs in another folder than the command did."""
    folders: dict[str, Any] = {name: _absolute(getattr(experiment, name)) for name in ("data_dir", "takedowns")}
    text = replace(experiment.text, checkpoint=_absolute(experiment.text.checkpoint))
    frozen: dict[str, Any] = {
        name: replace(config, checkpoint=_absolute(config.checkpoint))
        for name, config in (("vqgan", experiment.vqgan), ("clip", experiment.clip))
        if isinstance(config, FrozenVQGAN | FrozenCLIP)
    }
    model = replace(experiment.model, init_from=_absolute(experiment.model.init_from))
    return replace(experiment, **folders, text=text, model=model, **frozen)


def _absolute(path: str | None) -> Any:
    """The absolute form of a path that exists; names on a hub, and what is empty, stay as they are."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def load(workdir: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Run:
    """Opens a workdir that `rac3 run` or the stages have made.

        run = rac3.load("runs/quickstart")

    Args:
      config: the config file, needed only if the experiment uses classes defined in it (a retriever, an encoder):
        a workdir holds plain data, and no code is run out of it.

    Raises:
      InputError: the folder holds no experiment, or one that uses classes of a config that is not given.
    """
    folder = Path(workdir)
    record = folder / EXPERIMENT
    if not record.is_file():
        raise InputError(f"{folder} holds no {EXPERIMENT}, so it is no workdir; give the folder that `rac3 run` made")
    try:
        plain = json.loads(record.read_text())
        arguments, stored = plain["arguments"], plain["experiment"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{record} is damaged ({error}); run the command that made the workdir again") from error
    module = None if config is None else load_config_module(os.fspath(config))
    try:
        experiment = from_plain(stored, module)
    except KeyError as error:
        raise InputError(
            f"{folder} was made with {error.args[0].rpartition('.')[2]}, a class defined in its config; give the file: "
            f"rac3.load({str(folder)!r}, config={(shlex.split(arguments) or ['config.py'])[0]!r})"
        ) from error
    except (TypeError, InputError) as error:
        raise InputError(f"{record} was written by another version of rac3 ({error}); run the command again") from error
    if not isinstance(experiment, Experiment):
        raise InputError(f"{record} holds no experiment; run the command that made the workdir again")
    run = Run(experiment, Workdir(folder, experiment.name, arguments))
    keep_programs(folder)
    return run
