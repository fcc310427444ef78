"""Evaluate on MS-COCO: images drawn after captions, and captions of images, with and without retrieval (section 4.2).

    caption -> image    `image_samples` (10), the best by CLIP: FID and others over all images, CLIPScore
    image -> caption    `caption_samples` (32), the one of lowest perplexity: CIDEr-D and others against all references

Nothing is trained on COCO. The documents go in parts; what is done of them stays after a kill:

    SPLIT-K-00000.npz   features and vectors of the pictures drawn with K documents, and the first pictures themselves
    SPLIT-K-00000.json  their similarities to the captions, the captions written, and the references
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from rac3 import recipes
from rac3.artifacts.arrays import write_arrays
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.documents.coco import CAPTIONS, Coco
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.captions import caption_metrics, java_metrics
from rac3.evaluation.distributions import cmmd_metrics, distribution_metrics
from rac3.evaluation.features import Embedded
from rac3.evaluation.pictures import clipscore
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.held_out import PART_DOCUMENTS, SPLITS, best_captions, best_images, part_rows, real_pictures
from rac3.run import PARTS, Run

METRICS = "metrics.json"
SHOWN = 12  # documents of which the report shows what was made


def coco_splits(run: Run) -> list[Split]:
    """The held-out splits whose source is MS-COCO.

    Raises:
      InputError: there is none.
    """
    sources = run.experiment.data.sources()
    found = [split for split in SPLITS if isinstance(sources.get(split), Coco)]
    if not found:
        named = ", ".join(f"data.{split}={type(sources[split]).__name__}" for split in SPLITS if split in sources)
        raise InputError(
            f"no held-out source is MS-COCO ({named or 'there is none'}); use test=Coco('annotations/"
            "captions_val2014.json', 'val2014') in the config's Data"
        )
    return found


def evaluate_coco(run: Run) -> dict[str, Any]:
    """The metrics of the run's model on each split of COCO, by the number of documents in context; made or read.

    Raises:
      InputError: the model is not trained yet, or no held-out source is a `Coco`.
    """
    splits = coco_splits(run)
    recipe = recipes.coco(run.experiment, run.trained, run.step)
    if run.workdir.find(recipe) is None:
        with run.workdir.write(recipe) as draft:
            metrics = {split: _evaluate_split(run, split, draft.folder) for split in splits}
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return json.loads((run.workdir.require(recipe).folder / METRICS).read_text(encoding="utf-8"))


def shown(run: Run, split: Split, k: int) -> tuple[UInt8[np.ndarray, "n height width 3"], list[dict[str, Any]]]:
    """The pictures that were drawn for the first documents, and of each document its key, texts and caption."""
    stem = _stem(run.workdir.require(recipes.coco(run.experiment, run.trained, run.step)).folder, split, k, 0)
    rows = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return np.load(stem.with_suffix(".npz"), allow_pickle=False)["pictures"], rows[:SHOWN]


def _evaluate_split(run: Run, split: Split, folder: Path) -> dict[str, Any]:
    """With the documents of the config's `num_retrieved`, and with none."""
    most = run.experiment.evaluation.num_retrieved if run.experiment.retrieves else 0
    count = min(len(run.documents(split)), run.experiment.evaluation.documents)
    parts, name = part_rows(count, PART_DOCUMENTS), run.model_name
    with Progress(f"coco: {name} on {split}", len(parts) * len({0, most}), "parts") as bar:
        for k in sorted({0, most}):
            for part, rows in enumerate(parts):
                stem = _stem(folder, split, k, part)
                if not stem.with_suffix(".json").is_file():
                    _write_part(run, split, rows, k, stem)
                bar.update()
    return {
        "documents": count,
        "by_k": {
            str(k): _metrics(run, split, [_stem(folder, split, k, part) for part in range(len(parts))])
            for k in sorted({0, most})
        },
    }


def _stem(folder: Path, split: Split, k: int, part: int) -> Path:
    return folder / f"{split}-{k}-{part:05}"


def _write_part(run: Run, split: Split, rows: range, k: int, stem: Path) -> None:
    """Draws and captions some documents; the file that says it is done comes last."""
    items = run.documents(split).many(rows)
    by_text, by_image = (_neighbors(run, split, rows, part) for part in PARTS)
    pictures, similarities = best_images(run, split, items, by_text, k)
    captions = best_captions(run, split, items, by_image, k)
    arrays: dict[str, Any] = {"pictures": pictures[:SHOWN] if rows.start == 0 else pictures[:0]}
    if run.experiment.evaluation.features:
        embedded = run.features.embed([*pictures])
        arrays |= {"vectors": run.encoder.embed_images([*pictures]), "features": embedded.features}
        arrays |= {} if embedded.logits is None else {"logits": embedded.logits}
    write_arrays(stem.with_suffix(".npz"), arrays)
    made = [
        {
            "key": item.document.key,
            "text": item.document.text,
            "references": _references(item),
            "caption": caption,
            "similarity": float(similarity),
        }
        for item, caption, similarity in zip(items, captions, similarities, strict=True)
    ]
    write_atomic(stem.with_suffix(".json"), json.dumps(made, ensure_ascii=False) + "\n")


def _neighbors(run: Run, split: Split, rows: range, part: str) -> Int[np.ndarray, "n depth"]:
    if not run.experiment.retrieves:
        return np.full((len(rows), run.experiment.selection.depth), -1)
    return run.neighbors(split)[rows.start : rows.stop][:, PARTS.index(part)]


def _references(item: TokenizedDocument) -> list[str]:
    """All captions of an image; COCO's images have about five."""
    found = item.document.metadata.get(CAPTIONS)
    return [str(each) for each in found] if isinstance(found, list) else [item.document.text]


def _metrics(run: Run, split: Split, stems: Sequence[Path]) -> dict[str, Any]:
    """The figures over all parts."""
    rows = [row for stem in stems for row in json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))]
    captions, references = [row["caption"] for row in rows], [row["references"] for row in rows]
    pictures: dict[str, Any] = {"clipscore": clipscore(np.array([row["similarity"] for row in rows], np.float64))}
    if run.experiment.evaluation.features:
        parts = [np.load(stem.with_suffix(".npz"), allow_pickle=False) for stem in stems]

        def whole(name: str) -> np.ndarray:
            return np.concatenate([part[name] for part in parts if name in part])

        real, vectors = real_pictures(run, split)
        drawn = Embedded(whole("features"), whole("logits") if any("logits" in part for part in parts) else None)
        found = distribution_metrics(run.features.name, drawn, real)
        pictures |= {found.pop("name"): found, "cmmd": cmmd_metrics(whole("vectors"), vectors)}
    scores = caption_metrics(captions, references) | java_metrics(captions, references)
    return {"pictures": pictures, "captions": scores}
