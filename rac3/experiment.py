"""The `Experiment` that a config returns: everything that decides what rac3 computes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Literal

from rac3.artifacts.arrays import VectorDtype
from rac3.batches.loader import BatchConfig
from rac3.clip.encoder import Encoder
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, check_settings
from rac3.devices.cluster import Cluster
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import Framing, Source
from rac3.documents.filter import LaionFilter
from rac3.evaluation.settings import EvaluationConfig
from rac3.execution.local import Local
from rac3.execution.ray import Ray
from rac3.model.transformer import TransformerConfig
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.retriever import Chosen, Retriever
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.tokens.text import TextTokenizer
from rac3.training.loop import TrainingConfig
from rac3.training.optimizer import OptimizerConfig
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN

Split = str  # the name of a source: train, validation, tuning, test, or that of a part of the memory
Role = Literal["train", "memory", "held out"]


@dataclass(frozen=True)
class Data:
    """The document sources.

    Attributes:
      train: trained on, and the memory that training retrieves from.
      memory: parts that join the memory at inference only, by name; the model never trains on them. A part that is
        added changes nothing that was made before.
      withdrawn: names of parts of `memory` that are no longer retrieved from.
      validation, test: held out, and evaluated; encoders are never fitted on them.
      tuning: held out too, for what is chosen by looking at results: settings, and the step of the CM3 to compare with.
        Its documents should differ from those of `train` as those of `test` do.
      fit_on: the sources that encoders are fitted on where none is loaded: `train`, or parts of the memory too.
      entity_field: the metadata field that names what a document shows, for retrieval recall and accuracies; "" if
        there is none.
    """

    train: Source
    memory: Mapping[Split, Source] = field(default_factory=dict)
    withdrawn: tuple[Split, ...] = ()
    validation: Source | None = None
    test: Source | None = None
    tuning: Source | None = None
    fit_on: tuple[Split, ...] = ("train",)
    entity_field: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.memory, Mapping):
            raise InputError("data.memory is no mapping; name the parts, as in memory={'news': WebDataset('news')}")
        for name in self.memory:
            if name in ("train", "validation", "tuning", "test") or not re.fullmatch(r"[\w.-]+", name):
                raise InputError(f"data.memory names a part {name!r}; use another name, of letters, digits, _ . and -")
        parts = ", ".join(self.memory) or "none"
        for name in self.withdrawn:
            if name not in self.memory:
                raise InputError(f"data.withdrawn names {name!r}, which is no part of the memory; there are: {parts}")
        for name in self.fit_on:
            if name != "train" and name not in self.memory:
                raise InputError(
                    f"data.fit_on names {name!r}; use train, or parts of the memory, of which there are: {parts}"
                )
        if not self.fit_on:
            raise InputError("data.fit_on is empty; use train")
        named = self.sources()
        equal = [(a, b) for a in named for b in named if a < b and named[a] == named[b]]
        if equal:
            raise InputError(f"{' and '.join(equal[0])} are the same source; give each its own documents")

    def sources(self) -> dict[Split, Source]:
        """All splits but withdrawn ones, in the order in which they are prepared."""
        memory = {name: source for name, source in self.memory.items() if name not in self.withdrawn}
        held_out = {"validation": self.validation, "tuning": self.tuning, "test": self.test}
        named = {"train": self.train, **memory, **held_out}
        return {split: source for split, source in named.items() if source is not None}

    def memory_splits(self, split: Split) -> list[Split]:
        """The parts of the memory that queries of `split` search: in training, the training documents alone."""
        return ["train"] if split == "train" else [part for part in self.sources() if self.role(part) != "held out"]

    def role(self, split: Split) -> Role:
        if split == "train":
            return "train"
        return "memory" if split in self.memory else "held out"


@dataclass(frozen=True)
class Experiment:
    """One experiment. Every field can be set on the command line, except the sources and the name.

    Attributes:
      name: names the workdir, which no other experiment may share.
      seed: of every random choice.
      workdir: where artifacts go; "" is `runs/<name>`.
      data_dir: the folder that relative paths of sources start from.
      max_reject_fraction: a source with a larger share of damaged documents stops the run.
      max_text_tokens: longer texts are truncated, and counted.
      framing: how pictures become square for the built-in VQGAN and CLIP: `crop` keeps the middle, and what it loses is
        counted; `pad-white` and `pad-border` keep all, on white or on the mean color of the border.
      query_dropout: share of a training query's tokens (text, or image patches) that is dropped (paper, section 3.2).
      num_views: training queries of each document and part, each with its own dropout; an epoch takes the
        neighbors of one. The embedding and the search of the training queries take as many times as long.
      takedowns: a file of keys, one per line (KEY, or SPLIT:KEY for one split alone), of documents that are not
        retrieved and not trained on. They are on disk until their split is ingested without them.
      takedowns_missing_ok: keys that no document has are no error.
      embedding_dtype: of the vectors on disk; 768 of them take 3 kB in float32, 1.5 in bfloat16, 0.8 in int8.
      documents_per_shard: whose vectors, or neighbors, are made at a time and stored in one file. A worker holds the
        vectors of a shard in memory for each of its threads.
      executor: where `ingest`, `embed` and `retrieve` run: `Local()`, this process, or `Ray()`, a cluster.
      compare_with_cm3: also train and evaluate the vanilla CM3 of the same size, data and compute.
    """

    name: str
    data: Data
    seed: int = 0
    workdir: str = ""
    data_dir: str = ""
    max_reject_fraction: float = 0.05
    max_text_tokens: int = 256
    framing: Framing = "crop"
    query_dropout: float = 0.2
    num_views: int = 1
    takedowns: str = ""
    takedowns_missing_ok: bool = False
    embedding_dtype: VectorDtype = "float32"
    documents_per_shard: int = 65_536
    executor: Local | Ray = field(default_factory=Local)
    compare_with_cm3: bool = True
    filter: LaionFilter = field(default_factory=LaionFilter)
    text: TextTokenizer = field(default_factory=TextTokenizer)
    vqgan: FrozenVQGAN | ImageTokenizer = field(default_factory=FrozenVQGAN)
    clip: FrozenCLIP | Encoder = field(default_factory=FrozenCLIP)
    retriever: Retriever = field(default_factory=Scann)
    selection: Selection = field(default_factory=Selection)
    batches: BatchConfig = field(default_factory=BatchConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        check_own_part("vqgan", self.vqgan, FrozenVQGAN, ImageTokenizer)
        check_own_part("clip", self.clip, FrozenCLIP, Encoder)
        check_settings(self)
        if self.max_text_tokens < 1:
            raise InputError(f"max_text_tokens={self.max_text_tokens} leaves no text; use at least 1")
        if not 0 <= self.max_reject_fraction <= 1:
            raise InputError(f"max_reject_fraction={self.max_reject_fraction} is outside 0 to 1; use 0.05, say")
        if not 0 <= self.query_dropout < 1:
            raise InputError(f"query_dropout={self.query_dropout} is outside 0 to 1; the paper uses 0.2")
        if self.num_views < 1:
            raise InputError(f"num_views={self.num_views} is below 1; use 1, or more for neighbors that change")
        if self.num_views > 1 and self.query_dropout == 0:
            raise InputError(f"num_views={self.num_views} are all the same without query_dropout; use 1")
        if self.documents_per_shard < 1:
            raise InputError(f"documents_per_shard={self.documents_per_shard} is below 1; use tens of thousands")
        if self.evaluation.max_caption_tokens > self.max_text_tokens:
            raise InputError(
                f"evaluation.max_caption_tokens={self.evaluation.max_caption_tokens} exceeds "
                f"max_text_tokens={self.max_text_tokens}, the longest text that is trained on; use at most that"
            )
        if self.selection.depth < self.batches.candidates:
            raise InputError(
                f"batches.candidates={self.batches.candidates} exceeds selection.depth={self.selection.depth}, the "
                "neighbors kept per document; raise selection.depth"
            )
        if isinstance(self.retriever, Chosen) and self.retriever.num_neighbors > self.selection.depth:
            raise InputError(
                f"retriever names {self.retriever.num_neighbors} documents, more than the "
                f"selection.depth={self.selection.depth} that a query keeps; raise selection.depth"
            )

    @property
    def folder(self) -> Path:
        return Path(self.workdir or f"runs/{self.name}")

    @property
    def retrieves(self) -> bool:
        """False for the vanilla CM3."""
        return not isinstance(self.retriever, NoRetriever)

    @property
    def model_name(self) -> str:
        return "ra_cm3" if self.retrieves else "cm3"

    def vanilla(self) -> "Experiment":
        """The CM3 of the same size, data and compute: no retrieval (paper, section 4.1)."""
        return replace(self, retriever=NoRetriever())


def check_own_part(name: str, value: object, built_in: type, protocol: type) -> None:
    """Refuses an object that can't replace the built-in encoder.

    Raises:
      InputError: it lacks a member of the protocol, or is no dataclass, whose fields tell one encoder from another.
    """
    if isinstance(value, built_in | type):  # for a class see `check_settings`
        return
    kind = type(value)
    members = [each for each in vars(protocol) if not each.startswith("_")]
    fields = getattr(kind, "__dataclass_fields__", {})
    lacking = [each for each in members if not hasattr(kind, each) and each not in fields]  # no property is called
    if lacking:
        raise InputError(
            f"{name}={kind.__name__} lacks {' and '.join(lacking)}; give a {built_in.__name__}, or an object that has "
            f"{', '.join(members)} ({protocol.__module__}.{protocol.__name__})"
        )
    if not is_dataclass(value):
        raise InputError(
            f"{name}={kind.__name__} is not a dataclass; make it one, with what decides its output among its fields: "
            "they decide which artifacts are current"
        )
