"""Whether a picture or caption of a subject finds another document of it: ways to fit the retriever's CLIP.

    python benchmarks/subject_recall.py --data-dir DIR [--test] [--ways NAME ...] [--seeds 0 1 2] [--json FILE]

DIR is that of `configs/emoji_captions.py`. Two documents of each of 140 training subjects, drawn by a hash, leave the
memory and ask by their text or by their image; the rest is fitted on and searched, exactly. What counts is another
document of the subject among the first two. With `--test`, the documents of `unseen-test` ask, and `train` and
`unseen-memory` are fitted on and searched: for figures, not for choices. EfficientNet's features are computed once for
all ways.
"""

import argparse
import hashlib
import re
import shlex
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from measure import record

from rac3.clip.contrastive import contrastive_loss, subject_loss
from rac3.clip.efficientnet import POOLED
from rac3.clip.encoder import ClipText, mix
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.linear import LinearConfig, LinearTowers
from rac3.clip.model import unit_norm
from rac3.config import load_config_module
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import Document
from rac3.documents.reader import read_documents
from rac3.evaluation.bootstrap import mean_of
from rac3.evaluation.recall import recall_at
from rac3.stages.fit import clip as fitting
from rac3.stages.fit.features import features_of, trunk_params

SUBJECTS = 140  # that ask, of the training data
K = 2
FIELD = "concept"
PARTS = ("text", "image")
SAME_DRAWING = {"fluent-3d", "fluent-color"}  # styles that differ in shading alone: both ask, or neither


def place(*parts: object) -> int:
    """A random number that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def asking(documents: Sequence[Document]) -> set[int]:
    """The rows of the documents that leave the memory: two of each of some subjects that have more."""
    subjects = defaultdict(list)
    for row, document in enumerate(documents):
        subjects[document.metadata[FIELD]].append(row)
    chosen = set()
    for name in sorted((each for each in subjects if len(subjects[each]) > 3), key=lambda each: place("subject", each))[
        :SUBJECTS
    ]:
        rows = sorted(subjects[name], key=lambda row: place("document", documents[row].key))
        styles = {row: documents[row].metadata.get("style") for row in rows}
        first = rows[0]
        twins = [row for row in rows[1:] if {styles[row], styles[first]} == SAME_DRAWING]
        others = [row for row in rows[1:] if styles[row] not in SAME_DRAWING]
        chosen |= {first, (twins or others or rows[1:])[0]}
    return chosen


class Task:
    """Documents that ask, documents that are fitted on and searched, and the features of all."""

    def __init__(self, memory: list[Document], asked: list[Document], size: int) -> None:
        self.memory, self.asked, self.trunk = memory, asked, trunk_params(size)
        started = time.process_time()
        images = [document.images[0] for document in [*memory, *asked]]
        self.features = features_of(images, self.trunk, size)
        self.seconds = time.process_time() - started
        self.subjects = [[str(document.metadata[FIELD]) for document in documents] for documents in (memory, asked)]

    def recalls(self, memory: dict[str, np.ndarray], asked: dict[str, np.ndarray]) -> dict[str, Any]:
        """By part: the share of the questions whose first `K` answers have their subject, with a 95% interval."""
        found = {}
        for part, queries in asked.items():
            scores = queries @ memory[part].T
            first = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            hits = [
                recall_at(K, row[None], [subject], self.subjects[0])
                for row, subject in zip(first, self.subjects[1], strict=True)
            ]
            found[part] = mean_of(np.array(hits, np.float64))
        return found


def bm25(task: Task) -> dict[str, Any]:
    """Okapi BM25 over the words of captions, k1 = 1.2, b = 0.75."""
    words = [[Counter(re.findall(r"\w+", each.text.lower())) for each in some] for some in (task.memory, task.asked)]
    vocabulary = {word: number for number, word in enumerate(sorted({word for each in words[0] for word in each}))}
    counts = np.zeros((len(task.memory), len(vocabulary)), np.float32)
    for row, each in enumerate(words[0]):
        for word, count in each.items():
            counts[row, vocabulary[word]] = count
    having, lengths = (counts > 0).sum(0), counts.sum(1, keepdims=True)
    weights = np.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
    scores = weights * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))
    queries = np.zeros((len(task.asked), len(vocabulary)), np.float32)
    for row, each in enumerate(words[1]):
        queries[row, [vocabulary[word] for word in each if word in vocabulary]] = 1
    return task.recalls({"text": scores}, {"text": queries})


def neighbors(task: Task) -> dict[str, Any]:
    """Cosines of EfficientNet's last 1,280 features, of pictures alone."""
    features = task.features[:, -POOLED[-1] :]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return task.recalls({"image": unit[: len(task.memory)]}, {"image": unit[len(task.memory) :]})


def across(text: Any, image: Any, other_text: Any, other_image: Any, scale: Any, subjects: Any, most: float) -> Any:
    """Texts and images of one subject alone."""
    same = subjects[:, None] == subjects
    pairs = (text, other_image), (other_text, image)
    losses = [contrastive_loss(*each, scale, same, most)[0] for each in pairs]
    loss = (losses[0] + losses[1]) / 2
    return loss, {"loss": loss}


def mixture(text: Any, image: Any, other_text: Any, other_image: Any, scale: Any, subjects: Any, most: float) -> Any:
    """Each part against the vector of another document, the mean of its parts."""
    same, other = subjects[:, None] == subjects, unit_norm(other_text + other_image)
    loss = sum(contrastive_loss(each, other, scale, same, most)[0] for each in (text, image)) / 2
    return loss, {"loss": loss}


def fitted(
    task: Task,
    config: FrozenCLIP,
    seed: int,
    last: bool = False,
    loss: Callable[..., Any] = subject_loss,
    known: bool = True,
) -> dict[str, Any]:
    """The config's CLIP, fitted on the memory.

    Args:
      last: it has EfficientNet's last features alone.
      loss: in place of `subject_loss`.
      known: False leaves all documents of the subjects that are asked for out of the fit.
    """
    features = task.features.copy()
    if last:
        features[:, : -POOLED[-1]] = 0
    asked = set(task.subjects[1])
    rows = [row for row, subject in enumerate(task.subjects[0]) if known or subject not in asked]
    started = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(
            fitting, features_of=lambda *_: features[rows], trunk_params=lambda _: task.trunk, subject_loss=loss
        ),
    ):
        checkpoint = fitting.fit_clip(
            config, seed, MeshConfig().build(), [task.memory[row] for row in rows], Path(folder)
        )
    seconds = time.process_time() - started
    architecture, params = checkpoint.config, checkpoint.params
    assert isinstance(architecture, LinearConfig)
    model = LinearTowers(architecture)
    ids, mask = ClipText.fitted(checkpoint.tokenizer, architecture.text_config)(
        [document.text for document in [*task.memory, *task.asked]]
    )
    standard = params["standard"]
    inputs = ids, mask, (features - standard["mean"]) / standard["deviation"]
    text, image, _ = jax.device_get(
        jax.jit(lambda p, *x: model.apply({"params": p}, *x, method="compare"))(params, *inputs)
    )
    size = len(task.memory)
    has = np.ones(size, bool)
    both = mix(text[:size], image[:size], has, has)
    found = task.recalls(dict.fromkeys(PARTS, both), {"text": text[size:], "image": image[size:]})
    return found | {"cpu_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--ways", nargs="*", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    experiment = load_config_module("emoji_captions").get_config()
    config, data = experiment.clip, experiment.data

    def read(**sources: Any) -> list[Document]:
        return read_documents(sources, arguments.data_dir, experiment.filter, config.fit.max_documents)

    memory = read(train=data.train, **data.memory)
    if arguments.test:
        asked = read(test=data.test)
    else:
        rows = asking(memory)
        asked = [memory[row] for row in sorted(rows)]
        memory = [document for row, document in enumerate(memory) if row not in rows]
    assert isinstance(config.model, LinearConfig)
    task = Task(memory, asked, config.model.image_size)
    print(f"{len(memory)} documents in memory, {len(asked)} ask; features took {task.seconds:.0f} s of CPU", flush=True)
    ways: dict[str, Callable[[int], dict[str, Any]]] = {
        "BM25 over captions": lambda seed: bm25(task),
        "EfficientNet-Lite0, neighbors": lambda seed: neighbors(task),
        "own text and image": lambda seed: fitted(task, replace(config, subject_field=""), seed),
        "subjects: text and image": lambda seed: fitted(task, config, seed, loss=across),
        "subjects: part and document": lambda seed: fitted(task, config, seed, loss=mixture),
        "subjects: all pairs, last features": lambda seed: fitted(task, config, seed, last=True),
        "subjects: all pairs, cropped texts": lambda seed: fitted(task, replace(config, text_crop=0.5), seed),
        "subjects: all pairs, twice the width": lambda seed: fitted(
            task, replace(config, model=replace(config.model, projection_dim=2 * config.model.projection_dim)), seed
        ),
        "subjects: all pairs, twice the steps": lambda seed: fitted(
            task, replace(config, fit=replace(config.fit, steps=2 * config.fit.steps)), seed
        ),
        "subjects: all pairs, those asked for unseen": lambda seed: fitted(task, config, seed, known=False),
        "subjects: all pairs": lambda seed: fitted(task, config, seed),
    }
    results = []
    for name, way in ways.items():
        if arguments.ways and name not in arguments.ways:
            continue
        for seed in arguments.seeds if "subjects" in name or "own" in name else [0]:
            found = way(seed)
            results.append({"way": name, "seed": seed, **found})
            shares = ", ".join(
                f"{part} {found[part]['value']:.1%} ({found[part]['low']:.1%} to {found[part]['high']:.1%})"
                for part in PARTS
                if part in found
            )
            print(f"{name}, seed {seed}: {shares}", flush=True)
            if arguments.json:
                given = shlex.join(sys.argv[1:]).replace(str(arguments.data_dir), "DIR")
                command = f"python benchmarks/subject_recall.py {given}"
                more = {"memory": len(memory), "asked": len(asked), "features_cpu_seconds": round(task.seconds, 1)}
                arguments.json.write_text(record(command, ("jax", "flax", "optax"), results, **more), encoding="utf-8")


if __name__ == "__main__":
    main()
