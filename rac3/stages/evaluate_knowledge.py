"""Evaluate knowledge: whether a picture that is drawn after a caption shows the caption's entity (paper, section 5.1).

    caption -> `image_samples` images (paper: 256), of which two count: the best by CLIP, and the first as it came
            -> the entity that each of the two shows, as a judge tells

A source that is a `Judge` tells. Elsewhere it is the entity of the nearest true picture: by the network that
`evaluation.features` names, which no document of the run was shown to, and by the run's encoder, which has also picked
the sample. They compare with pictures of the held-out split and of the memory, at most `STANDING` of each entity; never
with the question's own, nor with one that any of the compared models had in context for it. So a copied document does
not match itself, and all rows of the table have the same judges.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from rac3 import recipes
from rac3.artifacts.arrays import write_arrays
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.bootstrap import share_of
from rac3.evaluation.gallery import UNDECIDED, nearest, standing
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.held_out import (
    SPLITS,
    EntityJudge,
    Pictures,
    baseline_pictures,
    drawn_images,
    entity,
    held_out,
    part_rows,
    retrieved,
    shown_in_memory,
    source_judge,
    true_pictures,
)
from rac3.run import Run

METRICS = "metrics.json"
STANDING = 4  # true pictures that stand for an entity
PART_PICTURES = 1024  # drawn, or looked at, at once; a kill costs as many
SOURCE, NETWORK, ENCODER = "source", "network", "encoder"  # who judges
KEPT, FIRST = "kept", "first"  # of the samples of a caption: the best by CLIP, the first as it came

Embed = Callable[[Sequence[Any]], np.ndarray]  # pictures to vectors


@dataclass(frozen=True, eq=False)
class Questions:
    """The documents of a split whose entities can be told apart.

    Attributes:
      rows: their numbers among all that pictures are drawn for.
      names: the entity of each.
      neighbors: of the text of each, in the memory of the first model.
      hidden: from the judge of each, the files of pictures: its own, and those that a model had in context for it.
      shown: true pictures by entity; empty if the source judges.
      left_out: how many `documents` have no text, image or name; how many `entities` have no picture but what is hidden
        from a question about them, and how many `questions` those are.
    """

    rows: Sequence[int]
    items: Sequence[TokenizedDocument]
    names: Sequence[str]
    neighbors: Int[np.ndarray, "n depth"]
    hidden: Sequence[set[bytes]]
    shown: Mapping[str, Sequence[TokenizedDocument]]
    left_out: Mapping[str, int]

    @classmethod
    def open(cls, models: Mapping[str, Run], split: Split) -> "Questions":
        run = next(iter(models.values()))
        items, neighbors = _asking(run, split)
        names = [entity(run, item) for item in items]
        hidden = [{image.data for image in item.document.images} for item in items]
        shown: dict[str, list[TokenizedDocument]] = {}
        rows, apart = [*range(len(items))], set(names)
        if source_judge(run) is None:
            _hide_given(models, split, hidden)
            most = STANDING + max(map(len, hidden), default=0)  # however many are hidden
            remembered = shown_in_memory(run, split, names, most)
            shown = {name: [] for name in sorted(set(names))}
            for name, item in zip(names, items, strict=True):
                shown[name].append(item)
            shown = {name: own + remembered.get(name, []) for name, own in shown.items()}
            files = {name: {item.document.images[0].data for item in known} for name, known in shown.items()}
            apart -= {name for name, mine in zip(names, hidden, strict=True) if files[name] <= mine}
            rows = [row for row in rows if names[row] in apart]
        left_out = {
            "documents": len(held_out(run, split)[0]) - len(items),
            "entities": len(set(names) - apart),
            "questions": len(items) - len(rows),
        }
        return cls(
            rows,
            [items[row] for row in rows],
            [names[row] for row in rows],
            neighbors[rows],
            [hidden[row] for row in rows],
            {name: known for name, known in shown.items() if name in apart},
            left_out,
        )

    @property
    def entities(self) -> list[str]:
        return sorted(set(self.names))

    def judges(self, run: Run) -> dict[str, EntityJudge]:
        """Who tells the entities of a picture for each question, in order; the first is nearest to an outsider."""
        if (by_source := source_judge(run)) is not None:
            return {SOURCE: by_source}
        judges = {ENCODER: self._judge(run, run.encoder.embed_images)}
        if run.experiment.evaluation.features:
            network = run.features
            judges = {NETWORK: self._judge(run, lambda pictures: network.embed(pictures).features), **judges}
        return judges

    def _judge(self, run: Run, embed: Embed) -> EntityJudge:
        """By the nearest true picture; "" where those of two entities are as near."""
        known = [item for items in self.shown.values() for item in items]
        of = np.repeat(np.arange(len(self.shown)), [len(items) for items in self.shown.values()])
        stand = standing(of, [item.document.images[0].data for item in known], self.hidden, STANDING)
        gallery = _vectors(embed, lambda rows: true_pictures(run, [known[row] for row in rows]), len(known))

        def tell(pictures: Pictures) -> list[str]:
            vectors = _vectors(embed, lambda rows: pictures[rows.start : rows.stop], len(pictures))
            numbers = nearest(vectors, gallery, of, stand).tolist()
            return ["" if number == UNDECIDED else [*self.shown][number] for number in numbers]

        return tell


def evaluate_knowledge(models: Mapping[str, Run]) -> dict[str, Any]:
    """The share of pictures that show the right entity by split, row of the table and judge, made or read.

    The artifact holds `metrics.json`, and for each split `SPLIT.json`: of each question its row among the drawings, its
    key and entity, and what each row of the table shows for it, as the first judge tells.

    Args:
      models: by name; the first is the experiment's own.

    Raises:
      InputError: a model is not trained yet, documents do not name their entities (`data.entity_field`), or there are
        fewer than two that can be told apart.
    """
    run = next(iter(models.values()))
    recipe = knowledge_recipe(models)
    if run.workdir.find(recipe) is None:
        asked = _questions(models)
        for model in models.values():
            draw_knowledge(model)
        with run.workdir.write(recipe) as draft:
            metrics = {}
            for split, questions in asked.items():
                metrics[split], told = _judged(models, split, questions)
                write_atomic(draft.folder / f"{split}.json", json.dumps(told, ensure_ascii=False) + "\n")
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return json.loads((run.workdir.require(recipe).folder / METRICS).read_text(encoding="utf-8"))


def knowledge_recipe(models: Mapping[str, Run]) -> recipes.Recipe:
    """Of what is judged: the drawings of all these models."""
    drawings = {name: _drawings_recipe(model) for name, model in models.items()}
    return recipes.knowledge(next(iter(models.values())).experiment, drawings)


def told(models: Mapping[str, Run], split: Split) -> list[dict[str, Any]]:
    """Of each question: its row among the drawings, its key and entity, and what each row of the table shows."""
    folder = next(iter(models.values())).workdir.require(knowledge_recipe(models)).folder
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def _questions(models: Mapping[str, Run]) -> dict[Split, Questions]:
    """Those of each held-out split.

    Raises:
      InputError: nothing can be told apart.
    """
    data = next(iter(models.values())).experiment.data
    if not data.entity_field:
        raise InputError("data.entity_field is empty; name the field of the metadata that says what an image shows")
    found = {split: Questions.open(models, split) for split in SPLITS if split in data.sources()}
    if all(len(questions.entities) < 2 for questions in found.values()):
        counts = [
            f"{len(each.entities)} in {split}"
            + (f" and {each.left_out['entities']} that have a single picture" if each.left_out["entities"] else "")
            for split, each in found.items()
        ]
        raise InputError(
            f"data.entity_field={data.entity_field!r} names fewer than two entities to tell apart "
            f"({', '.join(counts) or 'no split is held out'}); hold out pictures of two or more, each with other "
            "pictures in the split or in the memory"
        )
    return found


def draw_knowledge(run: Run) -> None:
    """Draws after the captions that name an entity; the artifact holds `SPLIT-PART.npz`, the `kept` and the `first`."""
    recipe = _drawings_recipe(run)
    if run.workdir.find(recipe) is not None:
        return
    settings = run.experiment.evaluation
    k = settings.num_retrieved if run.experiment.retrieves else 0
    with run.workdir.write(recipe) as draft:
        for split in (each for each in SPLITS if each in run.experiment.data.sources()):
            items, neighbors = _asking(run, split)
            parts = part_rows(len(items), max(1, PART_PICTURES // settings.image_samples))
            with Progress(f"knowledge: {run.model_name} on {split}", len(parts), "parts") as bar:
                for part, rows in enumerate(parts):
                    path = _part(draft.folder, split, part)
                    if not path.is_file():
                        pixels, best, _ = drawn_images(run, split, [items[row] for row in rows], neighbors[rows], k)
                        write_arrays(path, {KEPT: pixels[np.arange(len(pixels)), best], FIRST: pixels[:, 0]})
                    bar.update()


def drawings(run: Run, split: Split, rows: Sequence[int]) -> dict[str, Pictures]:
    """The `kept` and the `first` pictures of these rows of the documents that `draw_knowledge` draws for."""
    folder, start = run.workdir.require(_drawings_recipe(run)).folder, 0
    found: dict[str, dict[int, UInt8[np.ndarray, "_ _ 3"]]] = {KEPT: {}, FIRST: {}}
    for path in sorted(folder.glob(f"{split}-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            part = {which: file[which] for which in found}  # each access reads all of an array
        count = len(part[KEPT])
        for which, pictures in part.items():
            found[which] |= {row: pictures[row - start] for row in rows if start <= row < start + count}
        start += count
    return {which: np.stack([pictures[row] for row in rows]) for which, pictures in found.items()}


def _judged(models: Mapping[str, Run], split: Split, questions: Questions) -> tuple[dict[str, Any], list[Any]]:
    """The metrics of a split, and what is told of each question."""
    run = next(iter(models.values()))
    settings = run.experiment.evaluation
    entities = questions.entities
    metrics: dict[str, Any] = {
        "questions": len(questions.items),
        "entities": len(entities),
        "left_out": dict(questions.left_out),
        "samples": settings.image_samples,
        "network": run.features.name if settings.features else "",
    }
    if len(entities) < 2:
        return metrics, []
    judges = questions.judges(run)
    k = settings.num_retrieved if run.experiment.retrieves else 0
    pictures = {name: drawings(model, split, questions.rows) for name, model in models.items()}
    if settings.image_samples == 1:
        pictures = {name: {KEPT: each[KEPT]} for name, each in pictures.items()}
    made = baseline_pictures(run, questions.items, questions.neighbors, k)
    pictures |= {name: {KEPT: each} for name, each in made.items()}
    shares: dict[str, Any] = {name: {judge: {} for judge in judges} for name in pictures}
    shows: list[dict[str, str]] = [{} for _ in questions.items]
    for judge, tell in judges.items():
        for name, of_row in pictures.items():
            for which, each in of_row.items():
                answers = tell(each)
                right = np.array([answer == wanted for answer, wanted in zip(answers, questions.names, strict=True)])
                shares[name][judge][which] = share_of(right, questions.names)
                if judge == next(iter(judges)) and which == KEPT:
                    for row, answer in zip(shows, answers, strict=True):
                        row[name] = answer
    answered = [
        {"row": number, "key": item.document.key, "entity": name, "shows": row}
        for number, item, name, row in zip(questions.rows, questions.items, questions.names, shows, strict=True)
    ]
    return metrics | {"guessing": 1 / len(entities), "judges": [*judges], "shares": shares}, answered


def _asking(run: Run, split: Split) -> tuple[list[TokenizedDocument], Int[np.ndarray, "n depth"]]:
    """The documents with a text, an image and a name, which pictures are drawn for, and what their texts retrieved."""
    items, neighbors = held_out(run, split)
    rows = [row for row, item in enumerate(items) if item.document.text and item.document.images and entity(run, item)]
    return [items[row] for row in rows], neighbors[rows, 0]


def _hide_given(models: Mapping[str, Run], split: Split, hidden: Sequence[set[bytes]]) -> None:
    """Adds to what is hidden from each question the pictures that any of the models had in context for it."""
    for run in models.values():
        for files, row in zip(hidden, _asking(run, split)[1], strict=True):
            for item in retrieved(run, row, run.experiment.evaluation.num_retrieved):
                files |= {image.data for image in item.document.images}


def _vectors(embed: Embed, pictures: Callable[[range], Pictures], count: int) -> Float[np.ndarray, "pictures width"]:
    """Of L2 norm 1, some pictures at a time."""
    found = np.concatenate([embed([*pictures(rows)]) for rows in part_rows(count, PART_PICTURES)])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(found.dtype).tiny)


def _drawings_recipe(run: Run) -> recipes.Recipe:
    return recipes.drawings(run.experiment, run.trained, run.step)


def _part(folder: Path, split: Split, part: int) -> Path:
    return folder / f"{split}-{part:05}.npz"
