"""Filling in texts, continuing documents and scoring, by finished runs: how often each is right about unseen entities.

    python benchmarks/tasks.py WORKDIR [WORKDIR ...] [--out FILE.json]

Of each document of the test split of `Data`, whose captions name the entity, with the documents that its picture
retrieves in context and without; the first of four samples counts:

    infill_text  the name is masked in the caption, next to the picture; right if the caption comes out letter by letter
    continue     a picture after the caption; right if the source sees the entity in it
    score        its caption against three with other test entities' names, each scored after the picture; right if its
                 own is the most probable. By chance: 25%

Next to RA-CM3 with documents and without stand CM3 at its best, and copying: the gap is filled with the name that the
first document's metadata gives, its picture is returned, and the caption with its name is chosen.

The other tasks are measured by `rac3 evaluate` and its `--task infilling` and `--task few-shot`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import record
from seeds import PACKAGES

import rac3
from rac3.answering import Model
from rac3.config import InputError
from rac3.documents.document import Document, Judge, Text
from rac3.evaluation.entities import entity_of
from rac3.held_out import entity, held_out_documents
from rac3.prompt import MASK, Passage, Prompt
from rac3.stages.evaluate import comparisons

OTHERS = 3  # captions that a caption is scored against


def questions(model: Model) -> list[tuple[Document, str, list[str]]]:
    """The test documents whose caption has their entity's name, with the name, and the names of three others each."""
    items = [(item.document, entity(model, item)) for item in held_out_documents(model, "test")]
    named = [(document, name) for document, name in items if name and name in document.text and document.images]
    names = sorted({name for _, name in named})
    if len(names) <= OTHERS:
        raise SystemExit(
            f"{model.workdir.path} has {len(names)} entities in its test captions; {OTHERS + 1} are needed"
        )
    rng = np.random.default_rng(0)
    found = []
    for document, name in named:
        others = [each for each in names if each != name]
        found.append((document, name, [others[i] for i in rng.choice(len(others), OTHERS, replace=False)]))
    return found


def seen(model: Model, pictures: Sequence[np.ndarray]) -> list[str]:
    """The entity that the test source sees in each picture."""
    judge = model.experiment.data.test
    if not isinstance(judge, Judge):
        raise SystemExit(f"{model.workdir.path} has a test source that can't tell what a picture shows")
    return [look[model.experiment.data.entity_field] for look in judge.shown(np.stack(pictures))]


def retrieved(model: Model, k: int) -> list[list[Document]]:
    """The k documents that the picture of each question retrieves."""
    pictures = [document.images[0].pixels() for document, _, _ in questions(model)]
    return [[each.document for each in found] for found in model.retrieve_many(pictures, k)]


def copied(model: Model) -> dict[str, list[bool]]:
    """By task, whether the first document has the answer."""
    asked, first = questions(model), [documents[0] for documents in retrieved(model, 1)]
    names = [entity_of(document, model.experiment.data.entity_field) for document in first]
    shown = seen(model, [document.images[0].pixels() for document in first])
    named = [copy == name for copy, (_, name, _) in zip(names, asked, strict=True)]
    drawn = [look == name for look, (_, name, _) in zip(shown, asked, strict=True)]
    return {"infill_text": named, "continue": drawn, "score": named}


def right(model: Model, k: int) -> dict[str, list[bool]]:
    """By task, whether each answer is right, with k documents in context."""
    asked = questions(model)
    pictures = [document.images[0].pixels() for document, _, _ in asked]
    contexts = retrieved(model, k) if k else [[] for _ in asked]
    infills, follows, passages = [], [], []
    for (document, name, others), pixels, documents in zip(asked, pictures, contexts, strict=True):
        given: dict[str, Any] = {"image": pixels, "documents": documents, "retrieve": 0}
        infills.append(Prompt("infill_text", document.text.replace(name, MASK, 1), **given))
        follows.append(Prompt("continue", document.text, follow=("image",), documents=documents, retrieve=0))
        for each in (name, *others):
            caption = Text(document.text.replace(name, each, 1))
            scored = Document(document.key, (document.images[0], caption), {})
            passages.append(Passage(scored, 1, documents=documents))
    answers = [_made(answer) for _, answer in model.answers([*infills, *follows])]
    texts = [answer.texts[0] for answer in answers[: len(asked)]]
    shown = seen(model, [np.asarray(answer.images[0]) for answer in answers[len(asked) :]])
    log_probs = [_made(each).log_probs.sum() for each in model.scores(passages)]
    return {
        "infill_text": [text == document.text for text, (document, _, _) in zip(texts, asked, strict=True)],
        "continue": [look == name for look, (_, name, _) in zip(shown, asked, strict=True)],
        "score": (np.reshape(log_probs, (len(asked), 1 + OTHERS)).argmax(1) == 0).tolist(),
    }


def _made(answer: Any) -> Any:
    if isinstance(answer, InputError):
        raise answer
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", type=Path, nargs="+", metavar="WORKDIR", help="finished runs")
    parser.add_argument("--out", type=Path, help="takes all figures, as JSON")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for workdir in options.workdirs:
        models = comparisons(rac3.load(workdir))
        if not {"ra_cm3", "cm3_best"} <= models.keys():
            raise SystemExit(f"{workdir} has {', '.join(models)}; it takes RA-CM3, and CM3 at its best")
        model = models["ra_cm3"]
        most = max(model.experiment.batches.num_retrieved)
        answers = {
            f"RA-CM3, {most} documents": right(model, most),
            "RA-CM3, no documents": right(model, 0),
            "CM3 at its best": right(models["cm3_best"], 0),
            "the first document, copied": copied(model),
        }
        results[workdir.name] = {"questions": len(questions(model))}
        for name, each in answers.items():
            figures = {task: round(float(np.mean(of_task)), 4) for task, of_task in each.items()}
            results[workdir.name][name] = figures
            print(f"{workdir.name}, {name}:", ", ".join(f"{task} {value:.1%}" for task, value in figures.items()))
    if options.out:
        command = f"python benchmarks/tasks.py {' '.join(map(str, options.workdirs))}"
        options.out.write_text(record(command, PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    main()
