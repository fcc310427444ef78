"""Evaluate few-shot classification: two entities under labels that mean nothing, told apart by demonstrations.

Each of k runs has one demonstration of each label, and their probabilities are averaged (paper, section 5.4). The
demonstrations are images of the memory with a label for their text. The question is which label a held-out image of
one of the two entities has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.documents.document import Image
from rac3.documents.store import TokenizedDocument, Tokens
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.generation.tasks import classify
from rac3.held_out import SPLITS, entity, held_out_documents, segment_ids, shown_in_memory
from rac3.run import Run

METRICS = "metrics.json"
LABELS = ("animal x", "animal y")
SHOTS = (1, 2, 4, 8)
AT_ONCE = 16  # questions
SCORED = get_args(classify.Scored)

Scores = Float[np.ndarray, "questions runs labels"]


@dataclass(frozen=True, eq=False)
class Question:
    """An image that shows one of two entities.

    Attributes:
      demonstrations: for each label, the documents of its entity; as many of one as of the other.
      truth: the number of the right label.
    """

    item: TokenizedDocument
    demonstrations: tuple[Sequence[TokenizedDocument], Sequence[TokenizedDocument]]
    truth: int


def evaluate_few_shot(run: Run) -> dict[str, Any]:
    """The k-shot accuracy of the run's model on each held-out split, made or read.

    Raises:
      InputError: the model is not trained yet, or no documents name their entity (`data.entity_field`).
    """
    recipe = recipes.few_shot(run.experiment, run.trained, run.step)
    artifact = run.workdir.find(recipe)
    if artifact is None:
        if not run.experiment.data.entity_field:
            raise InputError("data.entity_field is empty; name the field of the metadata that says what an image shows")
        with run.workdir.write(recipe) as draft:
            splits = [split for split in SPLITS if split in run.experiment.data.sources()]
            metrics = {split: _evaluate_split(run, split) for split in splits}
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        artifact = run.workdir.require(recipe)
    return json.loads((artifact.folder / METRICS).read_text(encoding="utf-8"))


def questions(run: Run, split: Split) -> list[Question]:
    """One for each held-out document with an image: its entity, or another one of the split, drawn by the seed.

    The two labels are right in turn. All questions have the same number of demonstrations, the most of `SHOTS` that
    more than half of the entities have; documents of entities with fewer are left out.
    """
    rng = np.random.default_rng(run.experiment.seed)
    named = [(item, entity(run, item)) for item in held_out_documents(run, split) if item.document.images]
    shown = shown_in_memory(run, split, {name for _, name in named}, max(SHOTS))
    counts = sorted(map(len, shown.values()), reverse=True)
    shots = max(k for k in SHOTS if k <= counts[len(counts) // 2]) if counts else 0
    names = sorted(name for name, documents in shown.items() if len(documents) >= shots)
    asked: list[Question] = []
    for item, name in named:
        others = [other for other in names if other != name]
        if name in names and others:
            other = others[int(rng.integers(len(others)))]
            truth = len(asked) % 2
            first, second = (shown[each][:shots] for each in ((other, name) if truth else (name, other)))
            asked.append(Question(item, (first, second), truth))
    return asked


def _evaluate_split(run: Run, split: Split) -> dict[str, Any]:
    asked = questions(run, split)
    shots = [k for k in SHOTS if asked and k <= len(asked[0].demonstrations[0])]
    metrics: dict[str, Any] = {"questions": len(asked), "shots": shots}
    if not asked:
        return metrics
    total = (len(SCORED) + 1) * len(asked)
    with Progress(f"few-shot {run.model_name} on {split}", total, "answers") as bar:
        for scored in SCORED:
            found = []
            for start in range(0, len(asked), AT_ONCE):
                some = asked[start : start + AT_ONCE]
                found.append(_probabilities(run, some, scored))
                bar.update(len(some))
            metrics[scored] = _accuracies(np.concatenate(found), asked, shots)
        metrics["encoder"] = _accuracies(_similarities(run, asked), asked, shots)
        bar.update(len(asked))
    return metrics


def _probabilities(run: Run, asked: Sequence[Question], scored: classify.Scored) -> Scores:
    """The probability of each label in each run."""
    labels = [np.array(run.tokenizer.encode(label), np.int32) for label in LABELS]
    requests = []
    for question in asked:
        runs = [
            [_labelled(demonstration, ids) for demonstration, ids in zip(pair, labels, strict=True)]
            for pair in zip(*question.demonstrations, strict=True)
        ]
        requests.append(classify.request(run.form, _codes(question.item), labels, runs, scored))
    log_probs = iter(run.scorer.log_probs([part for each in requests for row in each.parts for part in row]))
    return np.array([[classify.answer([[next(log_probs) for _ in row]]) for row in each.parts] for each in requests])


def _similarities(run: Run, asked: Sequence[Question]) -> Scores:
    """The similarity of the image to each demonstration by the encoder: the same task without the model."""
    images = [each.item.document.images[0] for each in asked]
    shown = [
        item.document.images[0] for each in asked for pair in zip(*each.demonstrations, strict=True) for item in pair
    ]
    vectors = run.encoder.embed_images(images)
    demonstrations = run.encoder.embed_images(shown).reshape(len(asked), -1, len(LABELS), vectors.shape[-1])
    return np.einsum("qd,qrld->qrl", vectors, demonstrations)


def _accuracies(scores: Scores, asked: Sequence[Question], shots: Sequence[int]) -> dict[str, float]:
    """By k, the share of the questions whose right label has the highest mean score over the first k runs."""
    truth = np.array([question.truth for question in asked])
    return {str(k): float(np.mean(scores[:, :k].mean(1).argmax(-1) == truth)) for k in shots}


def _labelled(item: TokenizedDocument, label: Int[np.ndarray, " ids"]) -> Tokens:
    """The image of a document with a label for its caption."""
    return (False, label), (True, _codes(item))


def _codes(item: TokenizedDocument) -> Int[np.ndarray, " tokens"]:
    ids = segment_ids(item, Image)
    assert ids is not None  # only documents with images are asked about
    return ids
