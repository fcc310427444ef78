"""A run: what a workdir holds, opened.

Stages write artifacts and read those of earlier stages through a `Run`. Whoever opens a finished workdir, in a notebook
or for `rac3 generate`, has the same object.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Int, PyTree, UInt8

from rac3 import recipes
from rac3.artifacts.arrays import Rows, Vectors
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import Artifact, Workdir
from rac3.batches.groups import GroupBuilder
from rac3.batches.loader import BatchStream
from rac3.batches.masking import Masking
from rac3.clip.encoder import Encoder
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, fingerprint
from rac3.documents.document import Document, Image, framed
from rac3.documents.store import DocumentStore, Keys, Texts, TokenizedDocument, hash64
from rac3.evaluation.features import ImageFeatures, Network
from rac3.experiment import Experiment, Split
from rac3.generation.engine import Engine
from rac3.generation.prompts import Form
from rac3.generation.tasks.score import Scorer
from rac3.model.transformer import Transformer
from rac3.retrieval.memory import EmbeddingRows, MemoryPart
from rac3.retrieval.open_memory import IndexedPart, OpenMemory
from rac3.retrieval.retriever import Queries, Retriever
from rac3.tokens.text import Tokenizer
from rac3.tokens.vocabulary import NUM_SPECIALS, Vocabulary
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.metrics import read_metrics
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN

PROGRAMS = "compiled"  # the folder of compiled programs in a workdir
DOCUMENT = "document"  # the array of the vectors that are retrieved
PARTS = ("text", "image")  # of a document, each of which is a query (paper, section 3.2)

T = TypeVar("T")
R = TypeVar("R", bound="Run")


@dataclass(frozen=True)
class Found:
    """A document for a context, and its similarity to the query; None if it was given by hand."""

    document: Document
    score: float | None
    tokens: TokenizedDocument


class Run:
    """A workdir and the experiment it was made with. Everything is opened when it is first asked for, and once.

    Args:
      trained: the experiment that the model was trained with, if it is another one: a retriever or takedowns that are
        named at inference are those of `experiment` alone.
      step: of the model's checkpoint; None is the last.

    Raises:
      InputError: (of every member) the artifact is not made yet; the message has the command that makes it.
    """

    def __init__(
        self, experiment: Experiment, workdir: Workdir, trained: Experiment | None = None, step: int | None = None
    ) -> None:
        self.experiment = experiment
        self.workdir = workdir
        self.trained = trained or experiment
        self.step = step
        self._opened: dict[Any, Any] = {}  # by recipe; shared by runs that differ in how they retrieve
        self._recipes: dict[Any, Recipe] = {}
        self._lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """What is open stays where it is: another process opens it again."""
        return type(self), (self.experiment, self.workdir, self.trained, self.step)

    def with_retriever(self: R, retriever: Retriever) -> R:
        """This run with another retriever at inference, its model unchanged. `rac3 index` makes what that needs."""
        return self.variant(replace(self.experiment, retriever=retriever), self.trained, self.step)

    def variant(self: R, experiment: Experiment, trained: Experiment, step: int | None = None) -> R:
        """A run of other experiments in the same workdir; what both have in common is opened once."""
        other = type(self)(experiment, self.workdir, trained, step)
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
        return self.workdir.require(self.recipe(of, *arguments))

    def require_encoders(self, *of: Callable[..., Recipe]) -> None:
        """Raises InputError unless these exist; an encoder defined in the user's config needs no artifact."""
        for each in of:
            if recipes.OWN not in self.recipe(each).config:
                self.artifact(each)

    def _open(self, recipe: Recipe, opener: Callable[[Path], T], *how: Any) -> T:
        """`opener` of the artifact's folder, called once for each `how`."""
        # Each time: a stage that is writing may read this only as an input.
        folder = self.workdir.require(recipe).folder
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
    def features(self) -> ImageFeatures:
        """Pictures to features of the network that `evaluation.features` names.

        Raises:
          InputError: it names none, or a file that is missing.
        """
        weights, resolution = self.experiment.evaluation.features, self.images.resolution
        with self._lock:
            key = "features", weights, resolution
            if key not in self._opened:
                self._opened[key] = Network(weights, resolution)
            return self._opened[key]

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
        """The documents of a split that `takedowns` names, ascending.

        Raises:
          InputError: it names a document that no split has, unless `takedowns_missing_ok`.
        """
        keys = recipes.takedown_keys(self.experiment)
        if not keys:
            return np.zeros(0, np.int64)
        self._check_takedowns(keys)
        return self._rows_of(split, keys)[0]

    def _rows_of(self, split: Split, keys: Sequence[str]) -> tuple[Int[np.ndarray, " rows"], set[str]]:
        """The rows of a split that takedowns name, and those of the takedowns that do."""
        own = {key.removeprefix(f"{split}:") for key in keys}
        documents = self.documents(split)
        hashes = np.array([hash64(key.encode()) for key in own], np.uint64)
        rows = np.flatnonzero(np.isin(documents.column("key_hashes"), hashes))
        found = [item.document.key for item in documents.many(rows.tolist())]
        there = own & set(found)
        return rows[[key in own for key in found]], {key for key in keys if key.removeprefix(f"{split}:") in there}

    def _check_takedowns(self, keys: Sequence[str]) -> None:
        """Raises InputError for keys that no document has: what is to be taken down would stay."""
        checked = "takedowns", *keys
        if self.experiment.takedowns_missing_ok or checked in self._opened:
            return
        data = self.experiment.data
        parts = [split for split in data.withdrawn if self.workdir.find(recipes.documents(self.experiment, split))]
        unknown = set(keys).difference(*(self._rows_of(split, keys)[1] for split in [*data.sources(), *parts]))
        if unknown:
            first = ", ".join(repr(key) for key in sorted(unknown)[:3])
            example = self.documents("train")[0].document.key
            raise InputError(
                f"takedowns file {self.experiment.takedowns!r} names {len(unknown)} of {len(keys)} keys that no "
                f"document has, such as {first}; write them as rac3 does, such as {example!r} or 'train:{example}', or "
                "give --takedowns-missing-ok"
            )
        self._opened[checked] = True

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
        """The parameters of the checkpoint, laid out over this machine's mesh."""
        return self._open(self.training_recipe, self._restore, self.step)

    def _restore(self, folder: Path) -> PyTree:
        like = self.experiment.mesh.build().abstract(jax.eval_shape(initializer(self.model), jax.random.key(0)))
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        params = checkpoints.restore_params(like, self.step)
        checkpoints.close()
        return params

    @property
    def form(self) -> Form:
        """What prompts are made of, and how long they may be."""
        model = self.model
        return Form(
            self.builder,
            self.images.tokens_per_image,
            model.max_positions,
            model.max_segment_tokens,
            max(self.trained.batches.num_retrieved) if self.trained.retrieves else 0,
        )

    @property
    def engine(self) -> Engine:
        """Continues prompts with the model of the checkpoint, over this machine's mesh."""

        def start(folder: Path) -> Engine:
            mesh, vocabulary, starts = self.experiment.mesh.build(), self.vocabulary, self.tokenizer.word_starts
            if starts is not None:
                after = vocabulary.padded_size - vocabulary.image_start
                starts = np.pad(starts, (NUM_SPECIALS, after), constant_values=True)
            # Not `self.params`, which would stay in memory next to the engine's own arrangement.
            return Engine(self.model, self._restore(folder), vocabulary, mesh, self.form.image_width, starts)

        return self._open(self.training_recipe, start, "engine", self.step)

    @property
    def scorer(self) -> Scorer:
        """Log probabilities of what is given."""
        batches = self.experiment.batches
        return Scorer(self.model, self.params, batches.row, batches.max_groups)

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
        return recipes.evaluation(self.experiment, self.trained, self.step)

    @property
    def model_name(self) -> str:
        """`ra_cm3` or `cm3`; with `_best` if the model is not that of its last step."""
        return self.trained.model_name + ("" if self.step is None else "_best")

    def kept_steps(self) -> list[int]:
        """The steps of the model's checkpoints, ascending."""
        checkpoints = Checkpoints(self.trained_model().folder / CHECKPOINTS)
        steps = checkpoints.steps()
        checkpoints.close()
        return steps[::-1]

    def trained_model(self) -> Artifact:
        """The artifact of the model."""
        return self.workdir.require(self.training_recipe)

    def evaluation(self) -> Artifact:
        """The artifact of the evaluation."""
        return self.workdir.require(self.evaluation_recipe)

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
        return self.retrieve_many([text if image is None else image], k)[0]

    def retrieve_many(self, queries: Sequence[str | UInt8[np.ndarray, "_ _ 3"]], k: int) -> list[list[Found]]:
        """What each of several texts and images retrieves, as `retrieve` has it."""
        if not self.experiment.retrieves or k == 0 or not queries:
            return [[] for _ in queries]
        texts = [query for query in queries if isinstance(query, str)]
        images = [query for query in queries if not isinstance(query, str)]
        of_texts = iter(self.encoder.embed_texts(texts) if texts else [])
        of_images = iter(self.encoder.embed_images(images) if images else [])
        vectors = np.stack([next(of_texts if isinstance(query, str) else of_images) for query in queries])
        words = [query if isinstance(query, str) else "" for query in queries]
        keys = [text or "image" for text in words]
        memory, builder = self.memory(), self.builder
        selected = memory.retrieve(Queries(keys, vectors, words), np.full(len(queries), -1))
        out: list[list[Found]] = []
        for ids, scores in zip(selected.ids.tolist(), selected.scores.tolist(), strict=True):
            found: list[Found] = []
            for number, score in zip(ids, scores, strict=True):
                if number >= 0 and len(found) < k:
                    item = memory.document(number)
                    if builder.shown(item.tokens) is not None:
                        found.append(Found(item.document, score, item))
            out.append(found)
        return out

    def tokenize(self, documents: Sequence[Document]) -> list[TokenizedDocument]:
        """Text ids and image codes of documents that need not be in the memory."""
        documents = [framed(document, self.experiment.framing) for document in documents]
        return tokenize(documents, self.tokenizer, self.images, self.experiment.max_text_tokens)


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, images: ImageTokenizer, max_text_tokens: int
) -> list[TokenizedDocument]:
    """Text ids and image codes of each document."""
    pictures = [image for document in documents for image in document.images]
    codes = iter(images.encode(pictures) if pictures else ())  # a user's own tokenizer may not take none
    tokenized = []
    for document in documents:
        ids = [
            next(codes)
            if isinstance(segment, Image)
            else np.array(tokenizer.encode(segment.text)[:max_text_tokens], np.int32)
            for segment in document.segments
        ]
        tokenized.append(TokenizedDocument(document, tuple(ids)))
    return tokenized


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
